"""Activation memory grows with the sequence and not faster, and is shared out over the ranks.

Measured is one forward and backward of the quickstart model on random tokens of a single document: the most bytes of
tensors alive at once, on top of parameters and gradients. No tensor is as large as sequence x sequence (the scores)
or sequence x vocabulary (the logits). Ranks beyond one are emulated in one process; the numbers are per rank, and a
message under way counts for its sender.
"""

import math
from typing import Any

import torch

from benchmarks.harness import Options
from benchmarks.machine import ROOT
from benchmarks.result import Cell, Result, Samples, Setting, Table
from benchmarks.tensor_memory import TensorMemory
from hydra_dist.config import Config
from hydra_dist.config.file import load_config
from hydra_dist.context import ContextParallel, run_ranks
from hydra_dist.model import Transformer, initialize

NEEDS_GPU = False
SETTINGS: dict[str, Setting] = {
    "config": "configs/quickstart.yaml",
    "sequence_lengths": "8192,16384,32768",
    "ranks": "1,2",
    "vocab_size": 8192,
    "largest_ratio": 2.1,
}
"""``largest_ratio``: growth per doubling of the sequence that still counts as linear."""


def run(options: Options) -> Result:
    """Measure every sequence length on every number of ranks."""
    settings = options.settings
    lengths = [int(length) for length in str(settings["sequence_lengths"]).split(",")]
    config = load_config(ROOT / str(settings["config"]))
    vocab_size = int(settings["vocab_size"])
    rows: list[tuple[Cell, ...]] = []
    counts: dict[str, int] = {}
    quantities: dict[str, Samples] = {}
    ratios: list[float] = []
    widest = 0.0
    for ranks in map(int, str(settings["ranks"]).split(",")):
        previous: tuple[int, int] | None = None
        for length in lengths:
            measured = measure(config, vocab_size, length, ranks, options.device)
            peak = max(memory.peak_bytes for memory in measured)
            largest = max(memory.largest_elements for memory in measured)
            # Both bounds are of what one rank would hold: its own rows against everything.
            width = largest / (length * min(length, vocab_size) / ranks)
            widest = max(widest, width)
            ratio = None if previous is None else (peak / previous[1]) ** (1 / _doublings(previous[0], length))
            if ratio is not None:
                ratios.append(ratio)
            name = f"{length} tokens, {ranks} rank{'s' * (ranks > 1)}"
            quantities[f"peak bytes, {name}"] = Samples.of([memory.peak_bytes for memory in measured], "bytes")
            counts[f"largest tensor in elements, {name}"] = largest
            rows.append((length, ranks, peak / 2**20, "" if ratio is None else ratio, largest, width))
            options.say(f"{name}: {peak / 2**20:.0f} MiB a rank")
            previous = length, peak
    limit, steepest = float(settings["largest_ratio"]), max(ratios, default=0.0)
    return Result(
        holds=steepest <= limit and widest < 1,
        finding=f"at most {steepest:.3f} times the memory per doubling of the sequence (bound {limit}); "
        f"the largest tensor is {widest:.1%} of the smaller of sequence x sequence and sequence x vocabulary",
        quantities=quantities,
        counts=counts,
        table=Table(
            columns=("tokens", "ranks", "MiB per rank", "per doubling", "largest tensor, elements", "of S x min(S, V)"),
            rows=tuple(rows),
        ),
    )


def measure(config: Config, vocab_size: int, sequence_length: int, ranks: int, device: str) -> list[TensorMemory]:
    """The memory of one training step, a ``TensorMemory`` per rank."""
    model_config = config.model.model_copy(update={"vocab_size": vocab_size})
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocab_size, (1, sequence_length + 1), generator=generator).to(device)

    def one_rank(mesh: Any) -> TensorMemory:
        model = Transformer(
            model_config,
            activation_checkpointing=config.train.activation_checkpointing,
            loss_chunk_size=config.train.loss_chunk_size,
        ).to(device)
        initialize(model, seed=0)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        context = ContextParallel(mesh, layout=config.context.layout)
        autocast = config.train.precision == "bf16_autocast"
        plan = context.plan(sequence_length)
        tokens, targets = plan.shard(rows[:, :-1], dim=1), plan.shard(rows[:, 1:], dim=1)
        with TensorMemory() as memory:
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                loss = model(tokens, plan, targets=targets)
            (loss / sequence_length).backward()
            del loss
        return memory

    return [one_rank(None)] if ranks == 1 else run_ranks(ranks, one_rank, device=device)


def _doublings(shorter: int, longer: int) -> float:
    return math.log2(longer / shorter)
