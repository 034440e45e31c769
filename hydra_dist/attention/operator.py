"""Softmax attention on one device as one differentiable PyTorch operator.

``hydra_dist::attention`` and ``hydra_dist::attention_backward`` are custom operators, so that torch.compile, selective
activation checkpointing and profilers see one node each, whatever runs inside. The backend is chosen inside them too,
so that nothing is tried out while a compiler traces.
"""

import math
from typing import Any

import torch
from torch import Tensor

from hydra_dist.attention.backends import Choice, check, choose
from hydra_dist.attention.launch import Need, launch_of, need_of
from hydra_dist.attention.mask import Mask
from hydra_dist.attention.partial import attend_tiles, attend_tiles_backward
from hydra_dist.attention.probe import Where

_DEFAULT = Mask()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask = _DEFAULT,
    scale: float | None = None,
    backend: str = "auto",
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the keys that ``mask`` allows.

    Args:
        q: [B, Sq, Hq, D].
        k, v: [B, Sk, Hk, D]; Hq is a multiple of Hk, and query head h reads key head h * Hk // Hq.
        mask: which keys each query sees; causal by default.
        scale: factor on the scores. None: 1 / sqrt(D).
        backend: ``auto`` (see ``explain``) or one of ``backends()``.
        out_dtype: dtype of ``out``. None: that of q. torch.float32 for partial results that are to be merged.

    Returns:
        out [B, Sq, Hq, D], and lse [B, Hq, Sq], the log of each query's softmax normaliser in fp32 (fp64 for fp64).
        A query that sees no key has out 0 and lse -inf, and takes no part in the gradients. ``lse`` is not
        differentiable, and neither are the gradients (no second derivatives).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        ConfigError: an unknown backend, or one that cannot take these inputs.
    """
    check_inputs(q, k, v)
    mask.check(q.shape[0], q.shape[1], k.shape[1])
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ValueError(f"out_dtype {out_dtype} is no floating dtype")
    if not torch.compiler.is_compiling():  # the operator says it when it runs
        check(backend, q.device, q.dtype, q.shape[-1])
    out, lse = torch.ops.hydra_dist.attention(
        q,
        k,
        v,
        mask.document_starts,
        mask.k_document_starts,
        mask.q_positions,
        mask.k_positions,
        mask.causal,
        mask.window,
        1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale),
        backend,
        q.dtype if out_dtype is None else out_dtype,
    )
    return out, lse


def explain(q: Tensor, k: Tensor, mask: Mask = _DEFAULT, backend: str = "auto", in_tiles: bool = False) -> str:
    """One line that says which backend ``attention`` takes for such inputs, and why not each one before it.

    On a GPU this tries the backends that have not been tried yet for such inputs. ``in_tiles``: which one
    ``attend_tiles`` takes, as where keys come from other ranks.
    """
    if in_tiles:
        where = Where(q.device, q.dtype, q.shape[3], q.shape[2] // k.shape[2])
        chosen, _, why = choose(backend, where, Need(None, edges=mask.window is not None))
    else:
        chosen, _, why = _choice(q, k, mask, backend)
    return f"attention backend {chosen.name} ({chosen.summary}): {why}"


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError where q, k and v do not fit together."""
    if not q.dtype.is_floating_point:
        raise ValueError(f"q is {q.dtype}; attention takes a floating dtype")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}; attention takes [batch, sequence, heads, head_dim]")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype} and q is {q.dtype}; attention takes one dtype")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} has {x.shape[0]} batch rows and q has {q.shape[0]}")
        if x.shape[3] != q.shape[3]:
            raise ValueError(f"{name} has head_dim {x.shape[3]} and q has {q.shape[3]}")
    if k.shape != v.shape:
        raise ValueError(f"k has shape {list(k.shape)} and v has {list(v.shape)}; they must be the same")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        heads, key_heads = q.shape[2], k.shape[2]
        works = " or ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(f"{heads} query heads are not a multiple of {key_heads} key heads; {works} key heads work")


def _choice(q: Tensor, k: Tensor, mask: Mask, backend: str) -> Choice:
    where = Where(q.device, q.dtype, q.shape[3], q.shape[2] // k.shape[2])
    return choose(backend, where, need_of(mask, q.shape[1], k.shape[1]))


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@torch.library.custom_op("hydra_dist::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_starts: Tensor | None,
    k_document_starts: Tensor | None,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    backend: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    mask = Mask(causal, window, document_starts, k_document_starts, q_positions, k_positions)
    chosen, form, _ = _choice(q, k, mask, backend)
    wide = _lse_dtype(q.dtype)
    if form is not None and q.numel() > 0 and k.numel() > 0:
        out, lse = chosen.forward(q, k, v, launch_of(mask, form, q, k, scale, out_dtype))
        return out.to(out_dtype).contiguous(), lse.contiguous()
    out = q.new_zeros(q.shape, dtype=wide)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=wide)
    tiles = mask.tiles(q.shape[1], k.shape[1])
    attend_tiles(q, k, v, tiles, scale=scale, out=out, lse=lse, backend=chosen.name, fresh=True)
    return out.to(out_dtype), lse


@_attention.register_fake
def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_starts: Tensor | None,
    k_document_starts: Tensor | None,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    backend: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=_lse_dtype(q.dtype))
    return q.new_empty(q.shape, dtype=out_dtype), lse


@torch.library.custom_op("hydra_dist::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    document_starts: Tensor | None,
    k_document_starts: Tensor | None,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v in their dtypes. k and v may be wider than q, in whose dtype everything is computed:
    their gradients are then those of parts that somebody adds up."""
    dtypes = (q.dtype, k.dtype, v.dtype)
    k, v = k.to(q.dtype), v.to(q.dtype)
    mask = Mask(causal, window, document_starts, k_document_starts, q_positions, k_positions)
    chosen, form, _ = _choice(q, k, mask, backend)
    if form is not None and q.numel() > 0 and k.numel() > 0:
        sums = chosen.backward(grad_out, q, k, v, out, lse, launch_of(mask, form, q, k, scale))
    else:
        wide = _lse_dtype(q.dtype)
        sums = q.new_zeros(q.shape, dtype=wide), k.new_zeros(k.shape, dtype=wide), v.new_zeros(v.shape, dtype=wide)
        attend_tiles_backward(
            grad_out,
            q,
            k,
            v,
            out,
            lse,
            mask.tiles(q.shape[1], k.shape[1]),
            scale=scale,
            grad_q=sums[0],
            grad_k=sums[1],
            grad_v=sums[2],
            backend=chosen.name,
        )
    grad_q, grad_k, grad_v = (total.to(dtype).contiguous() for total, dtype in zip(sums, dtypes, strict=True))
    return grad_q, grad_k, grad_v


@_attention_backward.register_fake
def _attention_backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    document_starts: Tensor | None,
    k_document_starts: Tensor | None,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *mask_tensors, causal, window, scale, backend, _ = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, *mask_tensors)
    ctx.plain = (causal, window, scale, backend)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 9
    if grad_out is None:
        return None, None, None, *nothing
    q, k, v, out, lse, *mask_tensors = ctx.saved_tensors
    grads = torch.ops.hydra_dist.attention_backward(grad_out, q, k, v, out, lse, *mask_tensors, *ctx.plain)
    return *grads, *nothing


def _refuse_second_derivative(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError(
        "attention has no second derivative: differentiate once, without create_graph=True, or compute this part with "
        "plain tensor operations"
    )


_attention.register_autograd(_backward, setup_context=_setup_context)
_attention_backward.register_autograd(_refuse_second_derivative, setup_context=lambda ctx, inputs, output: None)
