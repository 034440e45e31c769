"""The ring and ZeRO change no number: 1, 2 and 4 ranks at ZeRO stages 0 to 3 train alike.

Every run trains the quickstart model from the same seed on the same rows of packed documents, in fp32 with AdamW at its
peak rate from the first step; a sequence is spread over all the ranks of its run. Each step's loss and gradient norm
are compared with those of one rank without ZeRO. The loss has to fall meanwhile, or equal numbers would mean little,
and a run from another seed, the control, must be told apart.

Training amplifies rounding, the more the higher the rate. How much it does is measured too, without ranks: one rank
whose loss is summed in other chunks differs from the reference by rounding alone.
"""

from benchmarks.harness import Options
from benchmarks.result import Cell, Result, Samples, Setting, Table
from benchmarks.training_runs import Run, relative_differences, train

NEEDS_GPU = False
SETTINGS: dict[str, Setting] = {
    "config": "configs/quickstart.yaml",
    "steps": 20,
    "sequence_length": 8192,
    "ranks": "1,2,4",
    "stages": "0,1,2,3",
    "learning_rate": 1e-3,
    "bound": 1e-5,
    "smallest_fall": 0.5,
}
"""``bound``: largest relative difference of a loss or a gradient norm; fp32 sums in another order, over 20 updates.
``smallest_fall``: nats per token by which the reference run's loss has to fall."""


def run(options: Options) -> Result:
    """Train once per number of ranks and ZeRO stage, and the control."""
    bound = float(options.settings["bound"])
    reference = _train(options, ranks=1, stage=0)
    quantities = {"loss, 1 rank, ZeRO 0": Samples.of(reference.column("loss"), "nats per token")}
    rows: list[tuple[Cell, ...]] = []
    worst = 0.0
    for ranks in map(int, str(options.settings["ranks"]).split(",")):
        for stage in map(int, str(options.settings["stages"]).split(",")):
            if (ranks, stage) == (1, 0):
                continue
            name = f"{ranks} rank{'s' * (ranks > 1)}, ZeRO {stage}"
            differences = _compare(name, _train(options, ranks, stage), reference, quantities)
            worst = max(worst, *differences)
            rows.append((ranks, stage, *differences))
            options.say(f"{name}: loss within {differences[0]:.1e}, gradient norm within {differences[1]:.1e}")
    rounding = _compare("other loss chunks", _train(options, 1, 0, loss_chunk_size=384), reference, quantities)
    rows.append(("1 (loss in other chunks)", 0, *rounding))
    control = _compare("another seed", _train(options, ranks=1, stage=0, seed=1), reference, quantities)
    rows.append(("1 (another seed)", 0, *control))
    losses = reference.column("loss")
    fall = losses[0] - losses[-1]
    holds = worst <= bound < min(control) and fall >= float(options.settings["smallest_fall"])
    return Result(
        holds=holds,
        finding=f"losses and gradient norms of {len(reference.steps)} steps agree within {worst:.1e} (bound "
        f"{bound:.0e}) over {len(rows) - 2} combinations of ranks and ZeRO stages; "
        f"the loss falls by {fall:.2f} nats meanwhile, rounding alone makes {max(rounding):.1e}, and another seed "
        f"differs by {min(control):.1e}",
        quantities=quantities,
        counts={"steps": len(reference.steps), "tokens per step": int(options.settings["sequence_length"])},
        table=Table(
            columns=("ranks", "ZeRO stage", "loss, largest relative difference", "gradient norm, the same"),
            rows=tuple(rows),
        ),
    )


def _train(options: Options, ranks: int, stage: int, seed: int = 0, loss_chunk_size: int = 512) -> Run:
    settings = options.settings
    overrides = {
        "train.steps": settings["steps"],
        "train.seed": seed,
        "train.precision": "fp32",
        "train.micro_batch_size": 1,
        "train.loss_chunk_size": loss_chunk_size,
        "train.gradient_accumulation_steps": 1,
        "data.sequence_length": settings["sequence_length"],
        "context.size": ranks,
        "zero.stage": stage,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": settings["learning_rate"],
        "schedule.name": "constant",
        "schedule.warmup_steps": 0,
        "evaluate.every_steps": 0,
        "evaluate.max_rows": 1,
        "checkpoint.every_steps": 0,
    }
    return train(str(settings["config"]), overrides, ranks, options.device)


def _compare(name: str, found: Run, reference: Run, quantities: dict[str, Samples]) -> tuple[float, float]:
    """Largest relative difference of the losses and of the gradient norms; every step's goes to ``quantities``."""
    largest = []
    for key, words in (("loss", "loss"), ("grad_norm", "gradient norm")):
        differences = relative_differences(found.column(key), reference.column(key))
        quantities[f"{words} difference, {name}"] = Samples.of(differences, "1")
        largest.append(max(differences))
    return largest[0], largest[1]
