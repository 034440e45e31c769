"""Attention over ranks as one differentiable PyTorch operator.

``hydra_dist::context_attention`` and ``hydra_dist::context_attention_backward`` are custom operators, so that
torch.compile and profilers see one node each, and selective activation checkpointing can keep ``out`` and ``lse``
instead of sending all keys around once more (``SAVED_BY_CHECKPOINT``).

The plan of a batch is named by a handle (``handles.py``).
"""

from typing import Any, Protocol

import torch
from torch import Tensor

import hydra_dist.attention  # noqa: F401  (registers hydra_dist::attention)
from hydra_dist.context import halo, ulysses  # noqa: F401  (register their operators)
from hydra_dist.context.handles import HANDLES, kept_alive


class Strategy(Protocol):
    """An algorithm for attention over ranks, such as ``Ring``."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        window: int | None,
        scale: float,
        logit_bound: float | None,
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        window: int | None,
        scale: float,
        key_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q in its dtype, and of k and v in ``key_dtype``."""


@torch.library.custom_op("hydra_dist::context_attention", mutates_args=())
def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    handle: int,
    causal: bool,
    window: int,
    scale: float,
    logit_bound: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the keys of all ranks.

    Args:
        q: [B, S_local, Hq, D].
        k, v: [B, S_local, Hk, D]; computed with in q's dtype. Where they are wider than q, so are their gradients.
        handle: names the plan.
        window: in tokens; -1 for none.
        logit_bound: |score| never passes it; None: unknown.

    Returns:
        out [B, S_local, Hq, D] in q's dtype, lse [B, Hq, S_local] in fp32 or wider, not differentiable.
    """
    strategy = HANDLES.get(handle).strategy
    k, v = k.to(q.dtype), v.to(q.dtype)
    return strategy.forward(q, k, v, causal=causal, window=_window(window), scale=scale, logit_bound=logit_bound)


@context_attention.register_fake
def _context_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    handle: int,
    causal: bool,
    window: int,
    scale: float,
    logit_bound: float | None = None,
) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=lse_dtype)


@torch.library.custom_op("hydra_dist::context_attention_backward", mutates_args=())
def context_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    handle: int,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v in their dtypes."""
    strategy = HANDLES.get(handle).strategy
    tensors = (grad_out, q, k.to(q.dtype), v.to(q.dtype), out, lse)
    return strategy.backward(*tensors, causal=causal, window=_window(window), scale=scale, key_dtype=k.dtype)


@context_attention_backward.register_fake
def _context_attention_backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    handle: int,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _window(window: int) -> int | None:
    return window if window > 0 else None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, handle, causal, window, scale, _ = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.plan = kept_alive(handle)
    ctx.plain = (handle, causal, window, scale)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    grads = torch.ops.hydra_dist.context_attention_backward(grad_out, *ctx.saved_tensors, *ctx.plain)
    return *grads, None, None, None, None, None


def _refuse_second_derivative(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError(
        "attention over ranks has no second derivative: differentiate once, without create_graph=True, or compute this "
        "part on one device with plain tensor operations"
    )


context_attention.register_autograd(_backward, setup_context=_setup_context)
context_attention_backward.register_autograd(_refuse_second_derivative, setup_context=lambda ctx, inputs, output: None)

SAVED_BY_CHECKPOINT = [
    torch.ops.hydra_dist.context_attention.default,
    torch.ops.hydra_dist.attention.default,
    torch.ops.hydra_dist.halo.default,
    torch.ops.hydra_dist.rows_to_heads.default,
    torch.ops.hydra_dist.heads_to_rows.default,
]
"""Operators whose results are worth keeping when the rest of a layer is recomputed in the backward pass."""
