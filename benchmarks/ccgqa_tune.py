"""Which tiles make the kernels of the CCGQA prologue fastest: one field of a tiling after the other, best kept.

A launcher takes a ``tiling`` in the place of the one in its table. What is found here is for the table: a person puts
it there, with the chip it was measured on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_timing import Captured, timer_of
from benchmarks.harness import Timer
from benchmarks.result import Samples
from hydra_dist.model.prologue import Prologue
from hydra_dist.model.rope import rope_tables

CHOICES: Mapping[str, tuple[int, ...]] = {
    "norm_rows": (16, 32, 64, 128),
    "rows": (32, 64, 128),
    "channels": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3),
    "programs": (1, 2, 3, 4),
    "dy_bytes": tuple(mib * 2**20 for mib in (12, 24, 48, 2**20)),
}
"""Values of each field that a tiling may have. More that a kernel cannot take only fail."""
REPEATS = 10
LARGEST_DIFFERENCE = 1e-2
"""Of a result from the usual tiling's, relative: beyond it the tiling computes something else."""


def sweep(module: Prologue, inputs: Sequence[Tensor], rounds: int, say: Callable[[str], None]) -> dict[str, Samples]:
    """Time forward and backward of ``module`` on packed projections with other tiles; samples by tiling."""
    from hydra_dist.kernels import ccgqa_prologue_backward, ccgqa_prologue_forward, ccgqa_prologue_workspace
    from hydra_dist.kernels.ccgqa_prologue_rows import chip_of, padded

    calls = launches(module, inputs, ccgqa_prologue_forward.forward, ccgqa_prologue_backward.backward)
    found: dict[str, Samples] = {}
    device = inputs[0].device
    facts = chip_of(device), inputs[0].element_size(), padded(module.switches.head_dim)
    for name, table in (
        ("forward", ccgqa_prologue_forward.TILINGS),
        ("backward", ccgqa_prologue_workspace.TILINGS),
    ):
        start = in_table(table, facts)
        measured = descend(start, _timing(calls[name], start, rounds, device, say))
        best = min(measured, key=lambda tiling: measured[tiling].median)
        say(f"tiles of {name}: best {best}, {1e6 * measured[best].median:.1f} us; "
            f"the table's {start}, {1e6 * measured[start].median:.1f} us")  # fmt: skip
        found |= {f"tiles of {name}, {tiling}": samples for tiling, samples in measured.items()}
    return found


def in_table(table: Mapping[Any, Any], facts: tuple[object, ...]) -> Any:
    """The one entry whose key names nothing but ``facts``. ValueError where there is none, or more."""
    found = [tiling for key, tiling in table.items() if set(key) <= set(facts)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} tilings for {facts}")
    return found[0]


def descend(start: Any, measure: Callable[[Any], Samples | None]) -> dict[Any, Samples]:
    """Vary the fields of ``start`` one after the other and keep the best value of each.

    Args:
        start: a frozen dataclass; it has to work.
        measure: seconds of a tiling, or None where it does not work.

    Returns:
        Every tiling that works, with its seconds.
    """
    samples = measure(start)
    if samples is None:
        raise ValueError(f"{start} does not work")
    measured = {start: samples}
    tried, best = {start}, start
    for name in (field.name for field in fields(start) if field.name in CHOICES):
        for value in CHOICES[name]:
            tiling = replace(best, **{name: value})
            if tiling in tried:
                continue
            tried.add(tiling)
            samples = measure(tiling)
            if samples is not None:
                measured[tiling] = samples
        best = min(measured, key=lambda tiling: measured[tiling].median)
    return measured


def launches(
    module: Prologue, inputs: Sequence[Tensor], forward: Callable[..., Any], backward: Callable[..., Any]
) -> dict[str, list[Callable[[Any], Sequence[Tensor | None]]]]:
    """For each direction and each input a call of its launcher with a tiling (None: the usual one)."""
    switches, taps, beta = module.switches, module.taps, module.beta()
    assert taps is not None
    assert beta is not None
    length = inputs[0].shape[1]
    rope_dim = switches.head_dim // 4 * 2
    tables = rope_tables(torch.arange(length, device=inputs[0].device), rope_dim, 10_000.0, torch.float32)
    assert tables is not None
    weights = [x.detach() for x in (taps.w0, taps.b0, taps.w1, taps.b1)]
    rest = [beta.detach(), *tables]
    shape = {
        "num_query_heads": switches.num_query_heads,
        "num_key_heads": switches.num_key_heads,
        "head_dim": switches.head_dim,
        "kernel_sizes": switches.kernel_sizes,
        "use_qk_mean": switches.use_qk_mean,
        "eps": switches.eps,
        "value_shift": switches.value_shift,
    }
    calls: dict[str, list[Callable[[Any], Sequence[Tensor | None]]]] = {"forward": [], "backward": []}
    for p in inputs:
        rows = (p.detach(), None, None, None, [length])
        q, k, v, inv = forward(*rows, *weights, *rest, **shape)
        kept = [*(torch.randn_like(x) for x in (q, k, v)), q, k, inv]
        calls["forward"].append(_with_tiling(forward, [*rows, *weights, *rest], shape))
        calls["backward"].append(_with_tiling(backward, [*kept, *rows, *weights[:3], *rest], shape))
    return calls


def _with_tiling(
    launcher: Callable[..., Any], arguments: Sequence[Any], shape: Mapping[str, Any]
) -> Callable[[Any], Sequence[Tensor | None]]:
    return lambda tiling: launcher(*arguments, **shape, tiling=tiling)


def _timing(
    calls: Sequence[Callable[[Any], Sequence[Tensor | None]]],
    start: Any,
    rounds: int,
    device: torch.device,
    say: Callable[[str], None],
) -> Callable[[Any], Samples | None]:
    expected = calls[0](start)
    timer: Timer = timer_of(device)

    def measure(tiling: Any) -> Samples | None:
        try:
            results = calls[0](tiling)
            captured = Captured([lambda call=call: call(tiling) for call in calls], device, REPEATS)  # type: ignore[misc]
        except Exception as error:  # a tiling may ask for more than the chip or the compiler gives, in many ways
            say(f"{tiling}: {next(iter(str(error).splitlines()), repr(error))}")
            return None
        for a, b in zip(results, expected, strict=True):
            if a is not None and b is not None and a.numel():
                difference = (a.float() - b.float()).norm() / b.float().norm()
                if not difference <= LARGEST_DIFFERENCE:
                    say(f"{tiling}: computes something else (by {difference:.1%})")
                    return None
        timer(captured)
        samples = Samples.of([timer(captured) / REPEATS for _ in range(rounds)], "s")
        say(f"{tiling}: {1e6 * samples.median:.1f} us")
        return samples

    return measure
