"""PyTorch's flash operator of a CPU, as it is and behind the signatures by which other libraries call theirs.

It takes fewer key heads than query heads as they are.
"""

import torch
from torch import Tensor
from torch.nn import functional


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's causal attention on one device; it takes fewer key heads as they are."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """PyTorch's flash operator of a CPU; all [B, H, S, D], lse [B, H, S]."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def flash_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Its backward."""
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, causal, scale=scale
    )
    return dq, dk, dv


def template_forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """As PyTorch's ring template calls an operator."""
    return flash(query, key, value, is_causal)


def template_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As it calls the operator's backward."""
    return flash_backward(grad_out, query, key, value, out, logsumexp, is_causal)


def flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:
    """``flash_attn``'s forward of one block; all [B, S, H, D], lse [B, H, S]."""
    out, lse = flash(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal, softmax_scale)
    return out.transpose(1, 2), lse, None, None


def flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
) -> None:
    """``flash_attn``'s backward of one block, into dq, dk and dv."""
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    grads = flash_backward(dout, q, k, v, out, softmax_lse, causal, softmax_scale)
    for target, grad in zip((dq, dk, dv), grads, strict=True):
        target.copy_(grad.transpose(1, 2))
