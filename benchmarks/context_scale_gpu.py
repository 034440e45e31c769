"""A million tokens on one GPU: a ring of emulated ranks is as fast as one kernel, and a model of 1B parameters trains.

The ring's eight ranks take turns on the GPU, so that together they do the work of one launch of the fastest attention
kernel over the whole sequence, forward and backward in bf16; its speed is the kernel's time over theirs. The model is
CCGQA, trained by the whole loop (ZeRO, clipping, optimizer) with checkpointed layers, what these keep on the host, and
the MLP in tiles.
"""

import math

import torch
from torch import Tensor

from benchmarks.harness import Options, cuda_seconds, interleaved
from benchmarks.machine import ROOT
from benchmarks.result import Cell, Result, Samples, Setting, Table
from benchmarks.training_runs import train
from hydra_dist.attention import Mask, attention, explain
from hydra_dist.config.file import load_config
from hydra_dist.context import ContextParallel, EmulatedMesh, run_ranks
from hydra_dist.costs.parameters import count_parameters
from hydra_dist.errors import RunError

NEEDS_GPU = True
GPU_ROWS = {
    "a ring of 8 emulated ranks against one kernel, 1,048,576 tokens": "one H100 or H200",
    "one step of a CCGQA model of 1B parameters, 1,048,576 tokens": "one H200, and 100 GiB of host memory",
}
SETTINGS: dict[str, Setting] = {
    "sequence_length": 2**20,
    "ranks": 8,
    "heads": "2/1",
    "head_dim": 128,
    "rounds": 3,
    "least_of_kernel": 0.95,
    "config": "configs/long_context.yaml",
    "num_layers": 7,
    "hidden_size": 4096,
    "query_compression": 8,
    "key_compression": 16,
    "mlp_tile_size": 16384,
    "steps": 1,
    "least_parameters": 10**9,
}
LARGEST_DIFFERENCE = 5e-2
"""Of the ring's output and gradients from the kernel's, root mean square, relative; both are in bf16."""
TIMEOUT = 600.0


def run(options: Options) -> Result:
    """Measure both rows."""
    as_stated = all(options.settings[key] == value for key, value in SETTINGS.items() if key != "rounds")
    quantities, ratio, cells = ring_against_kernel(options)
    trained, holds, step_cells = train_a_step(options)
    least = float(options.settings["least_of_kernel"])
    return Result(
        holds=ratio.median >= least and holds,
        finding=f"the ring reaches {ratio.median:.3f} of the kernel's speed (bar >= {least}); {step_cells[1]}",
        quantities={**quantities, **trained},
        table=Table(columns=("what", "found"), rows=(cells, step_cells)),
        rows=tuple(GPU_ROWS) if as_stated else (),
    )


def ring_against_kernel(options: Options) -> tuple[dict[str, Samples], Samples, tuple[Cell, ...]]:
    """Seconds of both, the ring's speed over the kernel's, and a line of the table."""
    settings, device = options.settings, torch.device(options.device)
    length, ranks, dim = (int(settings[key]) for key in ("sequence_length", "ranks", "head_dim"))
    query_heads, key_heads = (int(number) for number in str(settings["heads"]).split("/"))
    counts = (query_heads, key_heads, key_heads, query_heads)
    q, k, v, grad = (torch.randn(1, length, count, dim, device=device, dtype=torch.bfloat16) for count in counts)
    options.say(str(explain(q, k)))

    def kernel() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, _ = attention(leaves[0], leaves[1], leaves[2], mask=Mask(causal=True))
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    def one_rank(mesh: EmulatedMesh) -> list[Tensor]:
        seq = ContextParallel(mesh).plan(length)
        mine = [seq.shard(x, 1).requires_grad_() for x in (q, k, v)]
        out = seq.attention(mine[0], mine[1], mine[2])
        found = [out.detach(), *torch.autograd.grad(out, mine, seq.shard(grad, 1))]
        return [seq.shard(x, 1) - y for x, y in zip(wanted, found, strict=True)] if wanted else found

    def ring() -> list[list[Tensor]]:
        return run_ranks(ranks, one_rank, device=device, timeout=TIMEOUT)

    wanted = kernel()
    differences = [torch.cat(parts, 1) for parts in zip(*ring(), strict=True)]
    for difference, whole in zip(differences, wanted, strict=True):
        error = float(difference.float().norm() / whole.float().norm())
        if not error <= LARGEST_DIFFERENCE:
            raise RunError(f"the ring differs from the kernel by {error:.1%} in a tensor {list(whole.shape)}")
    wanted = []
    del differences
    timer = cuda_seconds if device.type == "cuda" else None
    measured = interleaved({"one kernel": kernel, "ring": ring}, int(settings["rounds"]), warmup=1, timer=timer)
    ratio = Samples.of([1 / value for value in measured.ratios["ring"].raw], "1")
    found = f"{ratio.median:.3f} of the kernel's speed ({measured.seconds['one kernel'].median:.2f} s)"
    options.say(f"a ring of {ranks} emulated ranks, {length:,} tokens: {found}")
    quantities = {f"{name}, seconds": samples for name, samples in measured.seconds.items()}
    return {**quantities, "ring, speed over the kernel's": ratio}, ratio, (f"ring of {ranks}, {length:,} tokens", found)


def train_a_step(options: Options) -> tuple[dict[str, Samples], bool, tuple[Cell, ...]]:
    """Seconds and memory of the steps, whether they are what is claimed, and a line of the table."""
    settings = options.settings
    overrides: dict[str, object] = {
        **{f"model.{key}": settings[key] for key in ("num_layers", "hidden_size", "query_compression")},
        "model.key_compression": settings["key_compression"],
        "model.head_dim": settings["head_dim"],
        "data.directory": "data/stdlib",
        "data.sequence_length": settings["sequence_length"],
        "context.size": 1,
        "zero.stage": 1,
        "schedule.warmup_steps": 0,
        "train.steps": settings["steps"],
        "train.activation_checkpointing": "layer",
        "train.activation_offload": "true" if options.device == "cuda" else "false",
        "train.mlp_tile_size": settings["mlp_tile_size"],
        "evaluate.max_rows": 1,
        "checkpoint.every_steps": 0,
    }
    config = load_config(ROOT / str(settings["config"]), [f"{key}={value}" for key, value in overrides.items()])
    parameters = count_parameters(config.model.model_copy(update={"vocab_size": 8192})).total
    done = train(str(settings["config"]), overrides, 1, options.device)
    seconds = Samples.of([int(settings["sequence_length"]) / value for value in done.column("tokens_per_second")], "s")
    quantities = {"seconds of a step": seconds, "loss": Samples.of(done.column("loss"), "nats")}
    if options.device == "cuda":
        quantities["GiB allocated"] = Samples.of(done.column("memory_gib"), "GiB")
    memory = f", {quantities['GiB allocated'].maximum:.1f} GiB allocated" if "GiB allocated" in quantities else ""
    holds = (
        parameters >= int(settings["least_parameters"])
        and len(done.steps) == int(settings["steps"])
        and all(math.isfinite(record["grad_norm"]) and record["grad_norm"] > 0 for record in done.steps)
    )
    found = f"{parameters / 1e9:.2f}B parameters, {seconds.median:,.0f} s a step{memory}"
    options.say(found)
    return quantities, holds, (f"a training step, {int(settings['sequence_length']):,} tokens", found)
