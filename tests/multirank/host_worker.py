"""One of two gloo processes: every transfer straight and through host memory, saved to a folder.

Run by torchrun as ``host_worker.py FOLDER``; ``test_through_host.py`` compares.
"""

import sys
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from hydra_dist.context import ContextParallel, distributed
from hydra_dist.context import mesh as mesh_module
from hydra_dist.context.distributed import DistributedTransport

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.float8_e4m3fn, torch.bool)
STRATEGIES = {"ring": (2, 1), "all_gather": (2, 1), "ulysses": (1, 2)}


def transfers(transport):
    """The five calls, in every dtype that they take, on parts of unequal size."""
    rank, size = transport.rank, transport.size
    generator = torch.Generator().manual_seed(rank)
    label = {"direction": "forward", "kind": "test"}
    found = {}
    for dtype in DTYPES:
        parts = [(8 * torch.randn(3 + peer, 2, generator=generator)).to(dtype) for peer in range(size)]
        own = parts[0][: 2 + rank].contiguous()
        other = 1 - rank
        came = [torch.zeros(3 + rank, 2).to(dtype), torch.zeros(2 + other, 2).to(dtype)]
        sends = [(other, parts[other]), (other, own)]
        transport.exchange(sends, [(other, tensor) for tensor in came], **label).wait()
        found |= {f"exchange {dtype} {index}": tensor for index, tensor in enumerate(came)}
        outputs = [torch.zeros(3 + rank, 2).to(dtype) for _ in range(size)]
        transport.all_to_all(outputs, parts, **label).wait()
        gathered = [torch.zeros(2 + peer, 2).to(dtype) for peer in range(size)]
        transport.all_gather(gathered, own, **label).wait()
        found |= {f"all_to_all {dtype} {peer}": tensor for peer, tensor in enumerate(outputs)}
        found |= {f"all_gather {dtype} {peer}": tensor for peer, tensor in enumerate(gathered)}
        if dtype.itemsize > 1:
            summed, total = torch.zeros(3 + rank, 2).to(dtype), parts[0].clone()
            transport.reduce_scatter(summed, parts, **label).wait()
            transport.all_reduce(total, **label).wait()
            found |= {f"reduce_scatter {dtype}": summed, f"all_reduce {dtype}": total}
    return {name: tensor.view(torch.uint8).clone() for name, tensor in found.items()}


def attention(context):
    """Outputs and gradients of attention and of a halo."""
    length = 67
    seq = context.plan(length)
    generator = torch.Generator().manual_seed(1)
    shards = [seq.shard(torch.randn(2, length, heads, 8, generator=generator), 1) for heads in (4, 2, 2, 4)]
    *leaves, grad_out = shards
    leaves = [x.requires_grad_() for x in leaves]
    out = seq.attention(*leaves)
    (before,) = seq.halo([(leaves[0].flatten(2), 3)])
    ((out * grad_out).sum() + before.square().sum()).backward()
    return {"out": out.detach(), "halo": before.detach()} | {f"gradient {i}": x.grad for i, x in enumerate(leaves)}


def over(transport):
    """Everything through a kind of ``DistributedTransport``."""
    device = torch.device("cpu")
    straight = transport(dist.new_group(), device)
    found = {"which": torch.tensor(straight.through_host), **transfers(straight)}
    tensor = torch.zeros(3)
    found["handed over as it is"] = torch.tensor(straight._outgoing(tensor).data_ptr() == tensor.data_ptr())
    with mock.patch.object(mesh_module, "DistributedTransport", transport):
        for strategy, shape in STRATEGIES.items():
            context = ContextParallel(init_device_mesh("cpu", shape, mesh_dim_names=("ring", "ulysses")), strategy)
            found |= {f"{strategy} {name}": value for name, value in attention(context).items()}
            sent = context.traffic.stats()
            found[f"{strategy} sent"] = torch.tensor(
                [sent[way][what] for way in sent for what in ("bytes", "messages")]
            )
    return found


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    hosted = partial(DistributedTransport, through_host=True)
    with mock.patch.object(distributed, "_fill", return_value=None):
        forgetful = transfers(hosted(dist.new_group(), torch.device("cpu")))
    found = {"straight": over(DistributedTransport), "through the host": over(hosted), "never copied back": forgetful}
    torch.save(found, Path(sys.argv[1]) / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
