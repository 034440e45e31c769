"""Dealing a whole tensor to the ranks by layout, and gathering it again."""

from typing import Any

import torch
from torch import Tensor

from hydra_dist.context.geometry import Geometry
from hydra_dist.context.transport import Transport


def shard(x: Tensor, dim: int, geometry: Geometry) -> Tensor:
    """This rank's rows of a whole tensor, along ``dim``. Differentiable."""
    parts = [_chunk(x, dim, chunk) for chunk in geometry.local_chunks]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].contiguous()


def unshard(x_local: Tensor, dim: int, geometry: Geometry, transport: Transport) -> Tensor:
    """The whole tensor on every rank. Differentiable for an objective that is the sum over ranks."""
    return _Unshard.apply(x_local, dim % x_local.dim(), geometry, transport)


def _chunk(x: Tensor, dim: int, chunk: range) -> Tensor:
    """The positions of a chunk, as a view."""
    return x[(slice(None),) * (dim % x.dim()) + (slice(chunk.start, chunk.stop, chunk.step),)]


class _Unshard(torch.autograd.Function):
    """All-gather of the shards; backward is its transpose."""

    @staticmethod
    def forward(ctx: Any, x_local: Tensor, dim: int, geometry: Geometry, transport: Transport) -> Tensor:
        ctx.dim, ctx.geometry, ctx.transport = dim, geometry, transport
        rows = x_local.movedim(dim, 0).contiguous()
        shards = [rows.new_empty(length, *rows.shape[1:]) for length in geometry.lengths]
        transport.all_gather(shards, rows, direction="forward", kind="unshard").wait()
        whole = rows.new_empty(geometry.sequence_length, *rows.shape[1:])
        for chunks, held in zip(geometry.dealing, shards, strict=True):
            for chunk, part in zip(chunks, held.split([len(chunk) for chunk in chunks]), strict=True):
                _chunk(whole, 0, chunk).copy_(part)
        return whole.movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _ReduceShard.apply(grad, ctx.dim, ctx.geometry, ctx.transport), None, None, None


class _ReduceShard(torch.autograd.Function):
    """This rank's rows of the sum over ranks of whole tensors; backward is its transpose."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, dim: int, geometry: Geometry, transport: Transport) -> Tensor:
        ctx.dim, ctx.geometry, ctx.transport = dim, geometry, transport
        rows = grad.movedim(dim, 0)
        inputs = [torch.cat([_chunk(rows, 0, chunk) for chunk in chunks]) for chunks in geometry.dealing]
        summed = torch.empty_like(inputs[geometry.rank])
        transport.reduce_scatter(summed, inputs, direction="backward", kind="unshard").wait()
        return summed.movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Unshard.apply(grad, ctx.dim, ctx.geometry, ctx.transport), None, None, None
