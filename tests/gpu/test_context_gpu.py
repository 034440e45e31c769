"""Attention over ranks that share one GPU: emulated ones in this process, and processes over gloo and host memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hydra_dist.attention import Mask, attention
from hydra_dist.context import ContextParallel, run_ranks

REPOSITORY = Path(__file__).parents[2]
LENGTH = 2048
WAYS = [
    ("ring", "zigzag", (4, 1)),
    ("ring", "balanced", (4, 1)),
    ("ring", "striped", (3, 1)),
    ("all_gather", "zigzag", (4, 1)),
    ("ulysses", "contiguous", (1, 8)),
    ("hybrid", "zigzag", (2, 2)),
]
MASKS = {
    "causal": ({}, None),
    "full": ({"causal": False}, None),
    "window": ({"window": 300}, None),
    "documents": ({}, [0, 1, 700, 764, 1500]),
}


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    heads = (8, 2, 2, 8)
    return [torch.randn(1, LENGTH, n, 64, generator=generator, dtype=torch.float64).to("cuda", dtype) for n in heads]


def starts_of(documents):
    if documents is None:
        return None
    starts = torch.zeros(1, LENGTH, dtype=torch.int64)
    for start in documents:
        starts[:, start:] = start
    return starts


def alone(options, documents, dtype, backend="auto"):
    *leaves, grad = (x.requires_grad_() for x in inputs(dtype))
    starts = starts_of(documents)
    mask = Mask(document_starts=None if starts is None else starts.cuda(), **options)
    out, _ = attention(*leaves, mask=mask, backend=backend)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]


def over_ranks(strategy, layout, ranks, options, documents, dtype, rotates=None):
    def one_rank(mesh):
        seq = ContextParallel(mesh, strategy, layout).plan(LENGTH, starts_of(documents), device=torch.device("cuda"))
        if rotates:
            seq.strategy.backward_rotates = rotates
        *leaves, grad = (seq.shard(x, 1).requires_grad_() for x in inputs(dtype))
        out = seq.attention(*leaves, **options)
        out.backward(grad)
        return [seq.unshard(x.detach(), 1) for x in (out, *(x.grad for x in leaves))]

    return run_ranks(ranks, one_rank, device="cuda", timeout=120)[0]


def rms(found, exact):
    return [float(((a.double() - b.double()) ** 2).mean().sqrt()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("strategy", "layout", "ranks"), WAYS)
def test_bf16_loses_no_more_than_one_device_does(strategy, layout, ranks, mask):
    options, documents = MASKS[mask]
    exact = alone(options, documents, torch.float64, "reference")
    ours = rms(over_ranks(strategy, layout, ranks, options, documents, torch.bfloat16), exact)
    single = rms(alone(options, documents, torch.bfloat16), exact)
    assert all(a < 1.15 * b for a, b in zip(ours, single, strict=True))


@pytest.mark.parametrize("mask", MASKS)
def test_queries_that_go_around(mask):
    options, documents = MASKS[mask]
    exact = alone(options, documents, torch.float64, "reference")
    ours = rms(over_ranks("ring", "zigzag", (4, 1), options, documents, torch.bfloat16, "queries"), exact)
    single = rms(alone(options, documents, torch.bfloat16), exact)
    assert all(a < 1.15 * b for a, b in zip(ours, single, strict=True))


def test_two_processes_share_a_gpu_through_the_host(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "from torch.distributed.device_mesh import init_device_mesh\n"
        "from hydra_dist.attention import Mask, attention\n"
        "from hydra_dist.context import ContextParallel\n"
        "dist.init_process_group('gloo')\n"
        "torch.cuda.set_device(0)\n"
        "mesh = init_device_mesh('cuda', (2, 1), mesh_dim_names=('ring', 'ulysses'))\n"
        "seq = ContextParallel(mesh, timeout=120).plan(512)\n"
        "generator = torch.Generator().manual_seed(0)\n"
        "whole = [torch.randn(1, 512, n, 64, generator=generator).cuda() for n in (4, 2, 2)]\n"
        "out = seq.unshard(seq.attention(*(seq.shard(x, 1) for x in whole)), 1)\n"
        "exact, _ = attention(*whole, mask=Mask(), backend='reference')\n"
        "assert float((out - exact).abs().max()) < 1e-4, float((out - exact).abs().max())\n"
        "dist.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
