"""Attention of one sequence over two or more processes: ours, what is measured beside it, and what bounds it.

A candidate takes the whole queries, keys and values, keeps the rows of its rank in the layout it wants, and does one
forward and backward on them per call. What it gives back can be compared with one device, row by row.
"""

import importlib
import importlib.util
import os
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from benchmarks import cpu_flash
from benchmarks.cpu_flash import flash, flash_backward, sdpa
from hydra_dist.context import ContextParallel

PACKAGE = "ring_flash_attn"
TORCH_RING_PARTS = ("_templated_ring_attention", "_templated_ring_attention_backward", "_RotateMethod", "_cp_options")
TORCH_RING = "torch.distributed.tensor.experimental._context_parallel._attention"


@dataclass(frozen=True)
class Problem:
    """Causal attention, [B, S, Hq, D] over [B, S, Hk, D], fp32 or wider, and the gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor

    @classmethod
    def random(cls, length: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> "Problem":
        """The same numbers on every rank."""
        generator = torch.Generator().manual_seed(0)
        q, k, v, grad = (
            torch.randn(1, length, n, head_dim, generator=generator, dtype=torch.float64).to(dtype)
            for n in (heads[0], heads[1], heads[1], heads[0])
        )
        return cls(q, k, v, grad)

    def to(self, dtype: torch.dtype) -> "Problem":
        return Problem(*(x.to(dtype) for x in (self.q, self.k, self.v, self.grad_out)))

    def rows(self, positions: Tensor) -> "Problem":
        return Problem(*(x.index_select(1, positions) for x in (self.q, self.k, self.v, self.grad_out)))

    @property
    def length(self) -> int:
        return self.q.shape[1]


class Candidate(ABC):
    """Something that can be timed on all ranks at once.

    Attributes:
        name: as tables show it.
        share: the part of a call's work that counts, where a call does more than a rank's part of the whole.
        positions: [S_local], the global position of each row of what ``step`` gives back; None where that is no
            result.
    """

    name: str
    share: float = 1.0
    positions: Tensor | None = None

    @abstractmethod
    def step(self) -> Sequence[Tensor]:
        """Forward and backward once: out and the gradients of q, k and v, [B, S_local, H, D] each."""


class Differentiated(Candidate):
    """Attention through autograd, on the rows at ``positions``."""

    def __init__(
        self, name: str, attend: Callable[[Tensor, Tensor, Tensor], Tensor], whole: Problem, positions: Tensor
    ):
        self.name, self.positions = name, positions
        local = whole.rows(positions)
        self._attend, self._grad_out = attend, local.grad_out
        self._inputs = [x.requires_grad_() for x in (local.q, local.k, local.v)]

    def step(self) -> Sequence[Tensor]:
        out = self._attend(*self._inputs)
        return [out.detach(), *torch.autograd.grad(out, self._inputs, self._grad_out)]


class OneDevice(Differentiated):
    """The whole sequence in every process, each for itself; a P-th of it is what P ranks without any loss take."""

    def __init__(self, whole: Problem, num_ranks: int) -> None:
        super().__init__("one device", sdpa, whole, torch.arange(whole.length))
        self.share = 1.0 / num_ranks


class TilesAlone(Candidate):
    """A rank's tiles under the zigzag layout, each in one call of the fused operator, all keys already there.

    Nothing is sent, merged or added up, so this is no attention: it is the arithmetic of a rank as the layout cuts it.
    """

    name = "tiles alone"

    def __init__(self, whole: Problem, rank: int, num_ranks: int) -> None:
        q, k, v, grad_out = (x.transpose(1, 2) for x in (whole.q, whole.k, whole.v, whole.grad_out))
        self._tiles: list[tuple[Tensor, Tensor, Tensor, Tensor, bool]] = []
        for start, stop in _zigzag(whole.length, rank, num_ranks):
            rows = slice(start, stop)
            for keys, causal in ((slice(0, start), False), (rows, True)):
                if keys.stop:
                    q_rows, grad_rows = q[:, :, rows].contiguous(), grad_out[:, :, rows].contiguous()
                    tile = (q_rows, k[:, :, keys].contiguous(), v[:, :, keys].contiguous(), grad_rows, causal)
                    self._tiles.append(tile)

    @torch.no_grad()
    def step(self) -> Sequence[Tensor]:
        done = [flash(q, k, v, causal) for q, k, v, _, causal in self._tiles]
        for (q, k, v, grad_out, causal), (out, lse) in zip(self._tiles, done, strict=True):
            flash_backward(grad_out, q, k, v, out, lse, causal)
        return ()


def ours(whole: Problem, way: str) -> Candidate:
    """``hydra_dist.context`` over all ranks.

    Args:
        way: strategy/layout, or strategy/layout/RxU for R ranks along the ring and U along the Ulysses dimension of the
            mesh; without it ``ulysses`` has all of them along the latter, and other strategies along the former.
    """
    strategy, layout, *shape = way.split("/")
    size = dist.get_world_size()
    grid = tuple(map(int, shape[0].split("x"))) if shape else (1, size) if strategy == "ulysses" else (size, 1)
    mesh = init_device_mesh("cpu", grid, mesh_dim_names=("ring", "ulysses"))
    seq = ContextParallel(mesh, strategy=strategy, layout=layout).plan(whole.length)
    return Differentiated(f"ours, {way.replace('/', ' ')}", seq.attention, whole, seq.positions)


def torch_ring(whole: Problem, group: dist.ProcessGroup, rotate: str) -> Candidate:
    """PyTorch's ring template with its head-tail balance, over the CPU's flash operator.

    The template is private, and what PyTorch builds on it has no operator for a CPU.

    Raises ImportError where this PyTorch has no such template.
    """
    module = importlib.import_module(TORCH_RING)
    lacking = [name for name in TORCH_RING_PARTS if not hasattr(module, name)]
    if lacking:
        raise ImportError(f"{TORCH_RING} has no {', '.join(lacking)}")
    method = {"alltoall": module._RotateMethod.ALL_TO_ALL, "allgather": module._RotateMethod.ALL_GATHER}[rotate]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        module._cp_options.rotate_method = method
        return _TorchRing.apply(q, k, v, group, module)

    positions = _zigzag_positions(whole.length, group)
    return Differentiated(f"PyTorch's ring, {rotate}", attend, whole, positions)


class _TorchRing(torch.autograd.Function):
    """The template's two halves as one differentiable function."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, module: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = module._templated_ring_attention(group, 2, cpu_flash.template_forward, q, k, v, is_causal=True)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group, ctx.module = group, module
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grads = ctx.module._templated_ring_attention_backward(
            ctx.group,
            2,
            cpu_flash.template_backward,
            grad_out.transpose(1, 2),
            "grad_out",
            query=q,
            key=k,
            value=v,
            out=out,
            logsumexp=lse,
            is_causal=True,
        )
        return *(grad.transpose(1, 2) for grad in grads[:3]), None, None


def deepspeed_ulysses(whole: Problem, group: dist.ProcessGroup) -> Candidate:
    """DeepSpeed's ``DistributedAttention``: heads instead of rows between two all-to-alls, over contiguous rows."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.sequence.layer import DistributedAttention

    # A shared-memory all-reduce that takes a C++ compiler and a minute to build; all-to-all does not use it.
    __compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
    attention = DistributedAttention(sdpa, group, scatter_idx=2, gather_idx=1)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    positions = torch.arange(rank * whole.length // size, (rank + 1) * whole.length // size)
    return Differentiated("DeepSpeed Ulysses", partial(_ulysses, attention), whole, positions)


def _ulysses(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, 0)


def ring_flash_attention(whole: Problem, group: dist.ProcessGroup) -> Candidate:
    """The zigzag ring of the package ring-flash-attn, over the CPU's flash operator in flash-attn's place.

    For a process of its own: it puts a stand-in for flash-attn into ``sys.modules``.

    Raises ImportError where the package, or something that it imports, is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise ImportError(f"the package {PACKAGE} is not installed")
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    vars(interface).update(
        _flash_attn_forward=cpu_flash.flash_attn_forward, _flash_attn_backward=cpu_flash.flash_attn_backward
    )
    # Its own __init__ also imports adapters for some versions of transformers, so the module is imported without.
    package = importlib.util.module_from_spec(spec)
    sys.modules |= {"flash_attn": types.ModuleType("flash_attn"), interface.__name__: interface, PACKAGE: package}
    attend = importlib.import_module(f"{PACKAGE}.zigzag_ring_flash_attn").zigzag_ring_flash_attn_func
    positions = _zigzag_positions(whole.length, group)
    return Differentiated("ring-flash-attention", partial(attend, causal=True, group=group), whole, positions)


def _zigzag_positions(length: int, group: dist.ProcessGroup) -> Tensor:
    held = _zigzag(length, dist.get_rank(group), dist.get_world_size(group))
    return torch.cat([torch.arange(start, stop) for start, stop in held])


def _zigzag(length: int, rank: int, num_ranks: int) -> list[tuple[int, int]]:
    """The positions of a rank: the pieces r and 2P - 1 - r of 2P, as one range where they touch."""
    pieces = 2 * num_ranks
    (a, b), (c, d) = ((i * length // pieces, (i + 1) * length // pieces) for i in (rank, pieces - 1 - rank))
    return [(a, d)] if b == c else [(a, b), (c, d)]
