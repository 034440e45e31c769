"""FlashAttention 3, from the package flash_attn_3 (the folder hopper/ of the flash-attention repository).

Called are ``_flash_attn_forward`` and ``_flash_attn_backward`` of ``flash_attn_interface``, with the signatures of
version 3.0.0 as of August 2026 (commit 0251105); versions that take ``window_size`` as one pair are refused.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from hydra_dist.attention import flash_family
from hydra_dist.attention.flash_family import Window
from hydra_dist.attention.launch import Documents, Form, Launch


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int, form: Form) -> str | None:
    """Why these kernels cannot run there or take no such mask, or None where they can."""
    if form == "any":
        return "FlashAttention 3 takes no positions and no documents of other rows"
    return flash_family.refuses("FlashAttention 3", device, dtype, head_dim, 8, 9)


def forward(q: Tensor, k: Tensor, v: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    """One launch, as ``Backend.forward``."""
    return flash_family.forward(_forward, q, k, v, launch)


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch, as ``Backend.backward``."""
    return flash_family.backward(_backward, grad_out, q, k, v, out, lse, launch)


def _package() -> Any:
    return import_module("flash_attn_interface")


def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: Window, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    options = _options(scale, window, documents)
    results = _package()._flash_attn_forward(q, k, v, causal=window[1] == 0, **options)
    return results[0], results[1]


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: Window,
    documents: Documents | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = flash_family.empty_like(q, k, v)
    _package()._flash_attn_backward(
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        dq=dq,
        dk=dk,
        dv=dv,
        is_causal=window[1] == 0,
        deterministic=flash_family.is_deterministic(),
        **_options(scale, window, documents),
    )
    return dq, dk, dv


def _options(scale: float, window: Window, documents: Documents | None) -> dict[str, Any]:
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "window_size_left": window[0],
        "window_size_right": window[1],
    }
    if documents is not None:
        options |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), documents.offsets)
        options |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), documents.longest)
    return options
