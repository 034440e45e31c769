"""Two processes reach nine tenths of the ideal, and are at least as fast as other libraries' context parallelism.

Measured is causal attention, forward and backward, of one sequence over processes of one thread each, from the rows
that each holds to their output and gradients. The ideal is a P-th of the time that one device takes for the whole
sequence, while P processes do so at the same time; every process has as much work as before and shares the machine with
the others. "Tiles alone" is the arithmetic of a rank as the zigzag layout cuts it, with all keys at hand and nothing
sent or merged. A round takes as long as its slowest process. Candidates take turns within each round, and ratios are
taken round by round.

Before anything is timed, every candidate is compared with one device in fp64. A wrong peer is named and not counted;
with a wrong result of ours there is nothing to measure.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness import Options
from benchmarks.ranks import Place, measure
from benchmarks.result import Cell, Result, Samples, Setting, Table
from hydra_dist.errors import ConfigError, RunError

NEEDS_GPU = False
SETTINGS: dict[str, Setting] = {
    "ranks": 2,
    "sequence_length": 4096,
    "heads": "8/2",
    "head_dim": 64,
    "rounds": 12,
    "ours": "ring/zigzag,all_gather/zigzag,ulysses/contiguous",
    "peers": "torch-alltoall,torch-allgather,deepspeed-ulysses,ring-flash-attention",
    "largest_error": 5e-6,
    "least_of_ideal": 0.9,
    "least_of_best_peer": 1.0,
}
"""``ours``: strategy/layout, or strategy/layout/RxU on a mesh of that shape; the fastest is judged.
``largest_error``: largest difference to one device in fp64 over the largest value, in fp32, for the output and each
gradient."""

IDEAL, TILES, OURS = "one device", "tiles alone", "ours, "
COLUMNS = (
    "what",
    "ms, median",
    "quartiles",
    "of ideal, median",
    "quartiles",
    "ours over it, median",
    "quartiles",
    "processor ms a rank",
    "largest error",
)
TIMEOUT = 1800.0


def left_out(device: str) -> str | None:
    """Why this benchmark has nothing to measure, or None."""
    return None if device == "cpu" else "it compares processes that share a CPU; without --gpu it works"


def run(options: Options) -> Result:
    """Start the ranks, time every candidate in them, and judge."""
    reason = left_out(options.device)
    if reason is not None:
        raise ConfigError(f"context_speed: {reason}")
    settings = options.settings
    measured = measure(
        "benchmarks.context_worker",
        {
            "sequence_length": int(settings["sequence_length"]),
            "heads": [int(number) for number in str(settings["heads"]).split("/")],
            "head_dim": int(settings["head_dim"]),
            "rounds": int(settings["rounds"]),
            "ours": _listed(settings["ours"]),
            "peers": _listed(settings["peers"]),
        },
        [Place()] * int(settings["ranks"]),
        "127.0.0.1",
        TIMEOUT,
    )
    for name, why in measured["absent"].items():
        options.say(f"{name}: absent: {why}")
    return judge(measured, settings)


def judge(measured: Mapping[str, Any], settings: Mapping[str, Setting]) -> Result:
    """What the ranks reported, as a result.

    Args:
        measured: {"errors": {name: {tensor: error}}, "seconds" and "processor": {name: [one per round]},
            "absent": {name: reason}}.
        settings: those of the benchmark.

    Raises RunError where a result of ours, or of one device, is wrong.
    """
    seconds: Mapping[str, Sequence[float]] = measured["seconds"]
    errors = {name: max(by_tensor.values()) for name, by_tensor in measured["errors"].items()}
    wrong = {name for name, error in errors.items() if not error <= float(settings["largest_error"])}
    ours = [name for name in seconds if name.startswith(OURS)]
    for name in (IDEAL, *ours):
        if name in wrong:
            raise RunError(
                f"context_speed: {name} differs from one device in fp64 by {errors[name]:.1e} (bound "
                f"{settings['largest_error']}), so there is nothing to time: {measured['errors'][name]}"
            )
    samples = {name: Samples.of(values, "s") for name, values in seconds.items()}
    processor = {name: Samples.of(values, "s") for name, values in measured["processor"].items()}
    of_ideal = {name: _ratio(seconds[IDEAL], values) for name, values in seconds.items() if name != IDEAL}
    best = min(ours, key=lambda name: samples[name].median)
    speedup = {name: _ratio(values, seconds[best]) for name, values in seconds.items() if name not in (IDEAL, best)}
    rivals = [name for name in seconds if name not in (IDEAL, TILES, *ours, *wrong)]
    nearest = min(rivals, key=lambda name: speedup[name].median, default=None)
    reached, least = of_ideal[best].median, float(settings["least_of_ideal"])
    beaten = nearest is not None and speedup[nearest].median >= float(settings["least_of_best_peer"])
    rows: list[tuple[Cell, ...]] = [
        (
            _label(name, name in wrong, int(settings["ranks"])),
            1e3 * samples[name].median,
            _spread(samples[name], 1e3),
            of_ideal[name].median if name in of_ideal else 1.0,
            _spread(of_ideal[name]) if name in of_ideal else "",
            speedup[name].median if name in speedup else "",
            _spread(speedup[name]) if name in speedup else "",
            1e3 * processor[name].median,
            f"{errors[name]:.1e}" if name in errors else "",
        )
        for name in seconds
    ]
    rows += [(f"{name} (absent)", *("" for _ in COLUMNS[1:])) for name in measured["absent"]]
    against = (
        "there is no peer to compare with"
        if nearest is None
        else f"{speedup[nearest].median:.3f} times as fast as the fastest peer, {nearest} (bar >= "
        f"{settings['least_of_best_peer']:g})"
    )
    named = f"; {', '.join(sorted(wrong))}: wrong, not counted" if wrong else ""
    return Result(
        holds=reached >= least and beaten,
        finding=f"{best} reaches {reached:.3f} of the ideal (bar >= {least:g}), {of_ideal[TILES].median:.3f} of it is "
        f"what its tiles alone would reach; {against}{named}",
        quantities={
            **{f"{name}, seconds": values for name, values in samples.items()},
            **{f"{name}, processor seconds": values for name, values in processor.items()},
            **{f"{name}, of ideal": values for name, values in of_ideal.items()},
            **{f"{name}, over {best}": values for name, values in speedup.items()},
        },
        table=Table(columns=COLUMNS, rows=tuple(rows)),
    )


def _ratio(over: Sequence[float], under: Sequence[float]) -> Samples:
    return Samples.of([a / b for a, b in zip(over, under, strict=True)], "1")


def _label(name: str, wrong: bool, ranks: int) -> str:
    shown = f"ideal: one device / {ranks}" if name == IDEAL else name
    return f"{shown} (wrong, not counted)" if wrong else shown


def _spread(samples: Samples, scale: float = 1.0) -> str:
    return f"{scale * samples.lower_quartile:.3g} to {scale * samples.upper_quartile:.3g}"


def _listed(setting: Setting) -> list[str]:
    return [name for name in str(setting).split(",") if name]
