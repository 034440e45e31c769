"""Training speed on one GPU: tokens per second, model FLOPs utilisation and memory of a CCGQA model.

The step is the whole one: loss, backward, clipping, ZeRO and the optimizer, in bf16, on the corpus that quickstart
uses. MFU counts the model's own FLOPs (recomputation left out) over the GPU's published dense bf16 rate.
"""

from benchmarks.harness import Options
from benchmarks.result import Cell, Result, Samples, Setting, Table
from benchmarks.training_runs import train

NEEDS_GPU = True
GPU_ROWS = {"configs/small.yaml on one GPU": "one GPU with bf16"}
SETTINGS: dict[str, Setting] = {
    "config": "configs/small.yaml",
    "steps": 30,
    "warmup": 5,
    "sequence_lengths": "8192,32768",
}
"""``warmup``: first steps that are left out."""


def run(options: Options) -> Result:
    """Train a few steps at each sequence length."""
    settings = options.settings
    rows: list[tuple[Cell, ...]] = []
    quantities: dict[str, Samples] = {}
    for length in map(int, str(settings["sequence_lengths"]).split(",")):
        overrides = {
            "train.steps": settings["steps"],
            "data.directory": "data/stdlib",
            "data.sequence_length": length,
            "context.size": 1,
            "train.micro_batch_size": 1,
            "train.gradient_accumulation_steps": 1,
            "evaluate.max_rows": 1,
            "checkpoint.every_steps": 0,
        }
        steps = train(str(settings["config"]), overrides, 1, options.device).steps[int(settings["warmup"]) :]
        speed = Samples.of([step["tokens_per_second"] for step in steps], "tokens/s")
        mfu = Samples.of([step.get("mfu", 0.0) for step in steps], "1")
        memory = max(step["memory_gib"] for step in steps)
        quantities[f"speed, {length} tokens"], quantities[f"MFU, {length} tokens"] = speed, mfu
        rows.append((length, speed.median, mfu.median, memory))
        options.say(f"{length} tokens: {speed.median:,.0f} tokens/s, MFU {mfu.median:.1%}, {memory:.1f} GiB allocated")
    return Result(
        holds=all(samples.minimum > 0 for samples in quantities.values()),
        finding=f"median MFU {rows[-1][2]:.1%} at {rows[-1][0]:,} tokens" if rows else "nothing measured",
        quantities=quantities,
        table=Table(columns=("tokens", "tokens/s", "MFU", "GiB allocated"), rows=tuple(rows)),
        rows=tuple(GPU_ROWS),
    )
