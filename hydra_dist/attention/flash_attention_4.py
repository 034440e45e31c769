"""FlashAttention 4, from the package flash-attn-4 (``flash_attn.cute``), which compiles its kernels when they are used.

Called are ``_flash_attn_fwd`` and ``_flash_attn_bwd`` of ``flash_attn.cute.interface``, with the signatures of
4.0.0b36. It has no backward below compute capability 9.0.
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
        return "FlashAttention 4 takes no positions and no documents of other rows"
    return flash_family.refuses("FlashAttention 4", device, dtype, head_dim, 9, 12)


def forward(q: Tensor, k: Tensor, v: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    """One launch, as ``Backend.forward``."""
    return flash_family.forward(_forward, q, k, v, launch)


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch, as ``Backend.backward``."""
    return flash_family.backward(_backward, grad_out, q, k, v, out, lse, launch)


def _package() -> Any:
    return import_module("flash_attn.cute.interface")


def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: Window, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    results = _package()._flash_attn_fwd(q, k, v, return_lse=True, **_options(scale, window, documents))
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
    options = _options(scale, window, documents)
    deterministic = flash_family.is_deterministic()
    # out before its gradient: the other packages have them the other way round.
    results = _package()._flash_attn_bwd(q, k, v, out, grad_out, lse, deterministic=deterministic, **options)
    return results[0], results[1], results[2]


def _options(scale: float, window: Window, documents: Documents | None) -> dict[str, Any]:
    left, right = (None if side < 0 else side for side in window)
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": right == 0,
        "window_size_left": left,
        "window_size_right": right,
    }
    if documents is not None:
        options |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), documents.offsets)
        options |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), documents.longest)
    return options
