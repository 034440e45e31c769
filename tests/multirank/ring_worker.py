"""One process of a gloo group of four: the same calls as emulated ranks make, saved to a folder.

Run by torchrun as ``ring_worker.py FOLDER``; ``test_ring_gloo.py`` runs ``everything`` on emulated ranks. A start of
processes takes longer than all cases, so one start runs them over grids of all shapes.
"""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from hydra_dist.context import ContextParallel
from hydra_dist.errors import RunError

LABELS = {"direction": "forward", "kind": "test"}
ATTENTIONS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 9},
    "documents": {"documents": ((0, 5, 6, 40), (0, 20))},
}
GRIDS = {
    # ranks of (ring, ulysses): (strategy, layout, ranks of an inner ring)
    (4, 1): [
        ("ring", "zigzag", None),
        ("ring", "contiguous", 2),
        ("ring", "striped", None),
        ("all_gather", "balanced", None),
        ("all_gather", "striped", None),
    ],
    (2, 1): [("ring", "balanced", None), ("ring", "contiguous", None), ("all_gather", "zigzag", None)],
    (2, 2): [("hybrid", "zigzag", None), ("hybrid", "striped", None)],
    (1, 4): [("ulysses", "zigzag", None)],
    (1, 2): [("ulysses", "contiguous", None)],
}
HEADS = {torch.float32: (4, 2, 2, 4), torch.bfloat16: (4, 4, 4, 4)}
"""Of q, k, v and the output's gradient. Ulysses over 4 ranks has two copies of each key head in fp32, and in a ring in
bf16 queries go around in the backward pass."""


def everything(mesh, grid):
    """Tensors by name: attention, halo, unshard and collectives, with gradients and what was sent."""
    results = {}
    for strategy, layout, inner_ring in GRIDS[grid]:
        context = ContextParallel(mesh, strategy, layout, inner_ring=inner_ring)
        for name, settings in ATTENTIONS.items():
            for dtype in (torch.float32, torch.bfloat16):
                results.update(_one_case(context, f"{strategy} {layout} {name} {dtype}", dtype, **settings))
        results.update(_collectives(context.wires.all))
    return results


def _one_case(context, name, dtype, documents=None, **mask):
    length = 67
    generator = torch.Generator().manual_seed(1)
    starts = None
    if documents is not None:
        starts = torch.zeros(2, length, dtype=torch.int64)
        for row, positions in enumerate(documents):
            for position in positions:
                starts[row, position:] = position
    seq = context.plan(length, starts)
    shards = [seq.shard(torch.randn(2, length, n, 16, generator=generator).to(dtype), 1) for n in HEADS[dtype]]
    *leaves, grad_out = shards
    leaves = [x.requires_grad_() for x in leaves]
    out = seq.attention(*leaves, **mask)
    whole = seq.unshard(leaves[2], 1)
    found = {"out": out, "whole": whole}
    if seq.geometry.has_halo:
        halo, narrow = seq.halo([(leaves[0].flatten(2), 3), (leaves[1].flatten(2).float(), 1)])
        found.update({"halo": halo, "narrow": narrow})
    loss = (out * grad_out).sum() + whole.float().sum()
    (loss + sum(found[key].float().square().sum() for key in ("halo", "narrow") if key in found)).backward()
    found.update({f"gradient {i}": x.grad for i, x in enumerate(leaves)})
    sent = seq.stats()
    found["sent"] = torch.tensor([sent[way][what] for way in sent for what in ("bytes", "messages", "hops")])
    return {f"{name} {key}": value.detach() for key, value in found.items()}


def _collectives(transport):
    rank, size = transport.rank, transport.size
    parts = [torch.arange(source + 2) + 10 * rank for source in range(size)]
    outputs = [torch.empty(rank + 2, dtype=torch.int64) for _ in range(size)]
    transport.all_to_all(outputs, parts, **LABELS).wait()
    summed = torch.empty(rank + 2, dtype=torch.int64)
    transport.reduce_scatter(summed, parts, **LABELS).wait()
    total = torch.tensor([rank + 1])
    transport.all_reduce(total, **LABELS).wait()
    fp8 = [torch.empty(2 + source).to(torch.float8_e4m3fn) for source in range(size)]
    transport.all_gather(fp8, torch.full((2 + rank,), 1.5 + rank).to(torch.float8_e4m3fn), **LABELS).wait()
    return {
        "all_to_all": torch.cat(outputs),
        "reduce_scatter": summed,
        "all_reduce": total,
        "all_gather fp8": torch.cat([x.float() for x in fp8]),
    }


def _silent_peer(context):
    """What each rank says of an attention for which rank 1 makes no call, and after how many seconds."""
    seq = context.plan(64)
    q = torch.zeros(1, 16, 4, 8)
    if context.rank == 1:
        return ""
    begin = time.monotonic()
    try:
        seq.attention(q, q, q, causal=False)
    except RunError as error:
        return f"{time.monotonic() - begin:.1f} {type(error).__name__}: {error}"
    return "nothing was raised"


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, folder = dist.get_rank(), Path(sys.argv[1])
    whole = None
    for grid in GRIDS:
        # A third dimension, as data replicas have it; the grid then is a part of the mesh.
        replicas = dist.get_world_size() // (grid[0] * grid[1])
        mesh = init_device_mesh("cpu", (replicas, *grid), mesh_dim_names=("data", "ring", "ulysses"))
        whole = whole or mesh
        found = everything(mesh["ring", "ulysses"], grid)
        torch.save(found, folder / f"{grid[0]}x{grid[1]} rank{rank}.pt")
    # All are made before the first falls silent: that takes all ranks.
    silent = {name: ContextParallel(whole["ring", "ulysses"], name, timeout=1.0) for name in ("ring", "all_gather")}
    for name, context in silent.items():
        (folder / f"silent {name} rank{rank}.txt").write_text(_silent_peer(context), encoding="utf-8")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
