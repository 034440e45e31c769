"""Long context is of use to the quickstart model: a window of 64 tokens costs bits per byte on held-out text.

The same model, starting values, seeds, rows and steps, once as configured (one of its three layers sees everything
before a token) and once with every layer limited to the last 64 tokens. If the configured model were no better, its
long sequences would be a cost without a return. The table's last
column looks only at tokens that have more of their own document before them than the window shows.
"""

import statistics
from typing import Any

from benchmarks.harness import Options
from benchmarks.result import Cell, Result, Samples, Setting, Table
from benchmarks.training_runs import train

NEEDS_GPU = False
SETTINGS: dict[str, Setting] = {
    "config": "configs/quickstart.yaml",
    "window": 64,
    "steps": 0,
    "seeds": "3,4,5",
    "processes": 2,
}
"""``steps``: 0 takes the configuration's own. ``seeds``: none that the configuration was chosen with."""


def run(options: Options) -> Result:
    """Train every seed with and without the window, in turns."""
    settings = options.settings
    window = int(settings["window"])
    # Same starting values in both: only what a row may see differs.
    variants: dict[str, dict[str, object]] = {
        "as configured": {},
        f"last {window} tokens": {"model.window": window, "model.layer_windows": "null"},
    }
    bits: dict[str, list[float]] = {name: [] for name in variants}
    far: dict[str, list[float]] = {name: [] for name in variants}
    for seed in map(int, str(settings["seeds"]).split(",")):
        names = list(variants) if seed % 2 == 0 else list(reversed(variants))
        for name in names:
            overrides: dict[str, object] = {"train.seed": seed, "evaluate.every_steps": 0, **variants[name]}
            overrides |= {"context.size": settings["processes"], "checkpoint.every_steps": 0}
            if settings["steps"]:
                overrides["train.steps"] = settings["steps"]
            found = train(str(settings["config"]), overrides, int(settings["processes"]), options.device)
            bits[name].append(float(found.evaluation["bits_per_byte"]))
            far[name].append(loss_after(found.evaluation, window))
            options.say(f"seed {seed}, {name}: {bits[name][-1]:.4f} bits per byte")
    full, short = (bits[name] for name in variants)
    gains = [b - a for a, b in zip(full, short, strict=True)]
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (name, statistics.fmean(bits[name]), min(bits[name]), max(bits[name]), statistics.fmean(far[name]))
        for name in variants
    )
    return Result(
        holds=min(short) > max(full),  # worse by more than the seeds' spread
        finding=f"a window of {window} costs {statistics.fmean(gains):.4f} bits per byte on average over "
        f"{len(gains)} seeds (from {min(gains):.4f} to {max(gains):.4f})",
        quantities={
            **{f"bits per byte, {name}": Samples.of(values, "bits per byte") for name, values in bits.items()},
            "cost of the window, seed by seed": Samples.of(gains, "bits per byte"),
        },
        table=Table(
            columns=("attention", "bits per byte, mean", "lowest", "highest", f"loss {window} tokens into a document"),
            rows=rows,
        ),
    )


def loss_after(evaluation: dict[str, Any], tokens: int) -> float:
    """Nats per target of the targets with at least ``tokens`` tokens of their own document before them.

    Bins that begin earlier are left out whole. ValueError where no target is that far into a document.
    """
    bins = [part for part in evaluation["loss_by_context"] if part["start"] >= tokens and part["targets"]]
    targets = sum(part["targets"] for part in bins)
    if not targets:
        raise ValueError(f"no target has {tokens} tokens of its document before it")
    return sum(part["loss"] * part["targets"] for part in bins) / targets
