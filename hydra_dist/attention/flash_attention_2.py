"""FlashAttention 2, from the package flash-attn.

Called are ``_flash_attn_forward`` and ``_flash_attn_backward`` of ``flash_attn.flash_attn_interface`` and their
``_varlen_`` counterparts, with the signatures of version 2.8.3 (the same in 2.8.4). With grouped queries the package
rounds each query head's dk and dv to the inputs' dtype before it adds them up.
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
        return "FlashAttention 2 takes no positions and no documents of other rows"
    return flash_family.refuses("FlashAttention 2", device, dtype, head_dim, 8, 12)


def forward(q: Tensor, k: Tensor, v: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    """One launch, as ``Backend.forward``."""
    return flash_family.forward(_forward, q, k, v, launch)


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch, as ``Backend.backward``."""
    return flash_family.backward(_backward, grad_out, q, k, v, out, lse, launch)


def _package() -> Any:
    return import_module("flash_attn.flash_attn_interface")


def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: Window, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    package = _package()
    function = package._flash_attn_forward if documents is None else package._flash_attn_varlen_forward
    results = function(q, k, v, return_softmax=False, **_options(scale, window, documents))
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
    package = _package()
    function = package._flash_attn_backward if documents is None else package._flash_attn_varlen_backward
    dq, dk, dv = flash_family.empty_like(q, k, v)
    options = _options(scale, window, documents)
    deterministic = flash_family.is_deterministic()
    function(grad_out, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, deterministic=deterministic, **options)
    return dq, dk, dv


def _options(scale: float, window: Window, documents: Documents | None) -> dict[str, Any]:
    options: dict[str, Any] = {
        "dropout_p": 0.0,
        "softmax_scale": scale,
        "causal": window[1] == 0,
        "window_size_left": window[0],
        "window_size_right": window[1],
        "softcap": 0.0,
        "alibi_slopes": None,
    }
    if documents is not None:
        options |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), documents.offsets)
        options |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), documents.longest)
    return options
