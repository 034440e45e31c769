"""The CCGQA prologue over ranks: the rows before each chunk are on their way while the other rows are computed.

Forward, the rows that other ranks need are sent straight from the projection; all local rows are computed as if nothing
stood before their chunk; then the few rows at the start of each chunk, which do read what came, are computed again.
Backward it is the other way round: first the gradients of the rows before each chunk, which need the first rows of the
chunk only, and while they go home, everything else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hydra_dist.context import halo_exchange, kept_alive
from hydra_dist.model.convolution import Taps
from hydra_dist.model.prologue_operator import plain_values
from hydra_dist.model.prologue_plain import Switches

_NUM_TENSORS = 9
"""Of the operator's arguments: p, ages, the taps, beta and the rotation."""


def prologue_over_ranks(
    p: Tensor,
    handle: int,
    ages: Tensor | None,
    chunk_lengths: Sequence[int],
    taps: Taps | None,
    beta: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    switches: Switches,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """``prologue_operator.prologue`` that fetches the rows before each chunk itself, from the plan that ``handle``
    names (``SequencePlan.halo_handle``). Differentiable once; all ranks call it, forward and backward."""
    none = (None,) * 4
    w0, b0, w1, b1 = none if taps is None else (taps.w0, taps.b0, taps.w1, taps.b1)
    cosines, sines = (None, None) if rope is None else rope
    tensors = (p, ages, w0, b0, w1, b1, beta, cosines, sines)
    q, k, v, *_ = torch.ops.hydra_dist.ccgqa_prologue_over_ranks(
        *tensors, handle, list(chunk_lengths), *plain_values(switches), backend
    )
    return q, k, v


class _Edges:
    """The first rows of each chunk, which read rows before it."""

    def __init__(self, chunk_lengths: tuple[int, ...], num_rows: int, device: torch.device) -> None:
        starts = [sum(chunk_lengths[:index]) for index in range(len(chunk_lengths))]
        self.lengths = [min(length, num_rows) for length in chunk_lengths]
        rows = [row for start, length in zip(starts, self.lengths, strict=True) for row in range(start, start + length)]
        self.rows = torch.tensor(rows, device=device)

    def of(self, x: Tensor | None, dim: int) -> Tensor | None:
        return None if x is None or x.numel() == 0 else x.index_select(dim, self.rows)


# Making the index of their rows waits for a GPU, and every layer asks for the same.
_edges = lru_cache(maxsize=64)(_Edges)


@dataclass(frozen=True)
class _Halo:
    """What comes from before each chunk: ``number`` rows of some channels of the projection."""

    name: str
    channels: slice
    number: int


def _halos(heads: int, num_key_heads: int, head_dim: int, kernel_sizes: list[int], value_shift: bool) -> list[_Halo]:
    """Rows for the convolutions, and one for the value shift; those that are wanted."""
    latent, values = heads * head_dim, num_key_heads * head_dim
    z = _Halo("z_before", slice(0, latent), sum(kernel_sizes) - 2)
    v = _Halo("v_before", slice(latent + values // 2, latent + values), int(value_shift))
    return [halo for halo in (z, v) if halo.number]


@torch.library.custom_op("hydra_dist::ccgqa_prologue_over_ranks", mutates_args=())
def _prologue_over_ranks(
    p: Tensor,
    ages: Tensor | None,
    w0: Tensor | None,
    b0: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    beta: Tensor | None,
    cosines: Tensor | None,
    sines: Tensor | None,
    handle: int,
    chunk_lengths: list[int],
    num_query_heads: int,
    num_key_heads: int,
    head_dim: int,
    kernel_sizes: list[int],
    use_qk_mean: bool,
    eps: float | None,
    value_shift: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, inv, and the halos z_before and v_before (empty where they are not wanted)."""
    plain = (num_query_heads, num_key_heads, head_dim, kernel_sizes, use_qk_mean, eps, value_shift, backend)
    compute = torch.ops.hydra_dist.ccgqa_prologue
    wanted = _halos(num_query_heads + num_key_heads, num_key_heads, head_dim, kernel_sizes, value_shift)
    exchange = halo_exchange(handle, [halo.number for halo in wanted], p.device)
    finish = exchange.begin_gather([p[..., halo.channels] for halo in wanted], len(chunk_lengths))
    weights = (w0, b0, w1, b1, beta)
    q, k, v, inv = compute(p, None, None, ages, *weights, cosines, sines, chunk_lengths, *plain)
    came = {halo.name: rows for halo, rows in zip(wanted, finish(), strict=True)}
    z_before, v_before = came.get("z_before"), came.get("v_before")
    edges = _edges(tuple(chunk_lengths), max(halo.number for halo in wanted), p.device)
    found = compute(
        edges.of(p, 1),
        z_before,
        v_before,
        edges.of(ages, 1),
        *weights,
        edges.of(cosines, 0),
        edges.of(sines, 0),
        edges.lengths,
        *plain,
    )
    for whole, rows in zip((q, k, v, inv), found, strict=True):
        if whole.numel():
            whole.index_copy_(1, edges.rows, rows)
    return q, k, v, inv, *(p.new_empty(0) if x is None else x for x in (z_before, v_before))


@_prologue_over_ranks.register_fake
def _prologue_over_ranks_fake(p: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    chunk_lengths, num_query_heads, num_key_heads, head_dim, kernel_sizes, _, eps, value_shift, _ = rest[_NUM_TENSORS:]
    B, S = p.shape[:2]
    keys = (B, S, num_key_heads, head_dim)
    inv = p.new_empty(
        (B, S, num_query_heads + num_key_heads) if eps is not None else (0,),
        dtype=torch.promote_types(p.dtype, torch.float32),
    )
    latent, chunks = (num_query_heads + num_key_heads) * head_dim, len(chunk_lengths)
    halves = num_key_heads * head_dim - num_key_heads * head_dim // 2
    return (
        p.new_empty(B, S, num_query_heads, head_dim),
        p.new_empty(keys),
        p.new_empty(keys),
        inv,
        p.new_empty((B, chunks, sum(kernel_sizes) - 2, latent) if sum(kernel_sizes) > 2 else (0,)),
        p.new_empty((B, chunks, 1, halves) if value_shift else (0,)),
    )


@torch.library.custom_op("hydra_dist::ccgqa_prologue_over_ranks_backward", mutates_args=())
def _prologue_over_ranks_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    q: Tensor,
    k: Tensor,
    inv: Tensor,
    z_before: Tensor,
    v_before: Tensor,
    p: Tensor,
    ages: Tensor | None,
    w0: Tensor | None,
    b0: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    beta: Tensor | None,
    cosines: Tensor | None,
    sines: Tensor | None,
    handle: int,
    chunk_lengths: list[int],
    num_query_heads: int,
    num_key_heads: int,
    head_dim: int,
    kernel_sizes: list[int],
    use_qk_mean: bool,
    eps: float | None,
    value_shift: bool,
    backend: str,
) -> list[Tensor]:
    """Gradients of p, w0, b0, w1, b1 and beta; an empty tensor for each that was None."""
    plain = (num_query_heads, num_key_heads, head_dim, kernel_sizes, use_qk_mean, eps, value_shift, backend)
    compute = torch.ops.hydra_dist.ccgqa_prologue_backward
    wanted = _halos(num_query_heads + num_key_heads, num_key_heads, head_dim, kernel_sizes, value_shift)
    exchange = halo_exchange(handle, [halo.number for halo in wanted], p.device)
    halos = tuple(x if x.numel() else None for x in (z_before, v_before))
    weights = (w0, b0, w1, b1, beta)
    edges = _edges(tuple(chunk_lengths), max(halo.number for halo in wanted), p.device)
    of_edges = compute(
        *(edges.of(x, 1) for x in (grad_q, grad_k, grad_v, q, k)),
        inv if eps is None else edges.of(inv, 1),
        edges.of(p, 1),
        *halos,
        edges.of(ages, 1),
        *weights,
        edges.of(cosines, 0),
        edges.of(sines, 0),
        edges.lengths,
        *plain,
    )
    returned = {"z_before": of_edges[1], "v_before": of_edges[2]}
    finish = exchange.begin_scatter([returned[halo.name] for halo in wanted])
    grads = compute(grad_q, grad_k, grad_v, q, k, inv, p, *halos, ages, *weights, cosines, sines, chunk_lengths, *plain)
    grad_p = grads[0]
    for halo, (rows, sums) in zip(wanted, finish(), strict=True):
        grad_p[..., halo.channels].index_add_(1, rows, sums.to(grad_p.dtype))
    return [grad_p, *grads[3:]]


@_prologue_over_ranks_backward.register_fake
def _prologue_over_ranks_backward_fake(*args: Any) -> list[Tensor]:
    p, _, w0, b0, w1, b1, beta = args[8:15]
    return [p.new_empty(0) if x is None else x.new_empty(x.shape) for x in (p, w0, b0, w1, b1, beta)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, _, inv, z_before, v_before = output
    ctx.mark_non_differentiable(inv, z_before, v_before)
    ctx.save_for_backward(q, k, inv, z_before, v_before, *inputs[:_NUM_TENSORS])
    ctx.plan = kept_alive(inputs[_NUM_TENSORS])
    ctx.plain = inputs[_NUM_TENSORS:]


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    grads = torch.ops.hydra_dist.ccgqa_prologue_over_ranks_backward(grad_q, grad_k, grad_v, *saved, *ctx.plain)
    weights = saved[7:12]  # w0, b0, w1, b1, beta, after p and ages
    found = [grad if x is not None else None for grad, x in zip(grads[1:], weights, strict=True)]
    return grads[0], None, *found, None, None, *(None for _ in ctx.plain)


def _refuse_second_derivative(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError("the CCGQA prologue has no second derivative: differentiate once, without create_graph=True")


_prologue_over_ranks.register_autograd(_backward, setup_context=_setup_context)
_prologue_over_ranks_backward.register_autograd(
    _refuse_second_derivative, setup_context=lambda ctx, inputs, output: None
)
