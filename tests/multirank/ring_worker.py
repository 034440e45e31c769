"""One process of a gloo group: the same calls as an emulated rank makes, saved to a folder.

Run by torchrun as ``ring_worker.py FOLDER``; ``test_ring_gloo.py`` runs ``everything`` on emulated ranks.
"""

import sys
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


def everything(mesh):
    """Tensors by name: attention, halo, unshard and collectives, with gradients and what was sent."""
    results = {}
    for layout in ("zigzag", "contiguous"):
        context = ContextParallel(mesh, layout=layout)
        for name, settings in ATTENTIONS.items():
            for dtype in (torch.float32, torch.bfloat16):
                results.update(_one_case(context, f"{layout} {name} {dtype}", dtype, **settings))
    results.update(_collectives(context.wires.ring))
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
    shards = [seq.shard(torch.randn(2, length, n, 8, generator=generator).to(dtype), 1) for n in (4, 2, 2, 4)]
    *leaves, grad_out = shards
    leaves = [x.requires_grad_() for x in leaves]
    out = seq.attention(*leaves, **mask)
    halo, narrow = seq.halo([(leaves[0].flatten(2), 3), (leaves[1].flatten(2).float(), 1)])
    whole = seq.unshard(leaves[2], 1)
    ((out * grad_out).sum() + halo.square().sum() + narrow.sum() + whole.float().sum()).backward()
    found = {"out": out, "halo": halo, "narrow": narrow, "whole": whole}
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


def _silent_peer(mesh):
    """What a rank says that waits for one which sends nothing: rank 0 waits, the others wait for rank 0 to finish."""
    transport = ContextParallel(mesh, timeout=1.0).wires.ring
    message = ""
    if transport.rank == 0:
        try:
            transport.exchange([], [(1, torch.empty(3))], **LABELS).wait()
        except RunError as error:
            message = f"{type(error).__name__}: {error}"
    return message


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    # A third dimension, as data replicas would have; the ring then is a part of the mesh.
    mesh = init_device_mesh("cpu", (1, dist.get_world_size(), 1), mesh_dim_names=("data", "ring", "ulysses"))
    context_mesh = mesh["ring", "ulysses"]
    folder = Path(sys.argv[1])
    torch.save(everything(context_mesh), folder / f"rank{dist.get_rank()}.pt")
    message = _silent_peer(context_mesh)
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "silent.txt").write_text(message)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
