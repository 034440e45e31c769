"""This package's own Triton kernels, which know every mask in one launch.

Positions, windows and document starts go to the kernels as they are; they skip the blocks that the mask leaves empty.
On the CPU they run in Triton's interpreter, for tests, where TRITON_INTERPRET=1 was set before triton was imported.

triton is imported when it is first used, never by importing this file.
"""

import os
from typing import Any

import torch
from torch import Tensor

from hydra_dist.attention.launch import Form, Launch


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int, form: Form) -> str | None:
    """Why the kernels cannot run there, or None where they can."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton compiles for GPUs; on the CPU it has an interpreter for tests (TRITON_INTERPRET=1)"
    if device.type not in ("cpu", "cuda"):
        return f"the Triton kernels run on CUDA, and this is {device.type}"
    try:
        from hydra_dist.kernels import attention_launch
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return attention_launch.refuses(device, dtype, head_dim)


def forward(q: Tensor, k: Tensor, v: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    """One launch, as ``Backend.forward``; out is unrounded where ``launch.out_dtype`` does not say otherwise."""
    from hydra_dist.kernels import attention_forward

    out_dtype = launch.out_dtype or torch.float32
    return attention_forward.forward(q, k, v, scale=launch.scale, out_dtype=out_dtype, **_mask(q, launch))


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch, as ``Backend.backward``; the gradients come in fp32."""
    from hydra_dist.kernels import attention_backward

    return attention_backward.backward(grad_out, q, k, v, out, lse, scale=launch.scale, **_mask(q, launch))


def _mask(q: Tensor, launch: Launch) -> dict[str, Any]:
    mask, band = launch.mask, launch.band
    assert launch.documents is None
    if mask is None:
        return {
            "causal": launch.causal or band is not None,
            "window": None if band is None else band.window,
            "q_positions": None if band is None else band.offset + torch.arange(q.shape[1], device=q.device),
            "k_positions": None,
            "document_starts": None,
            "k_document_starts": None,
        }
    return {
        "causal": mask.causal,
        "window": mask.window,
        "q_positions": mask.q_positions,
        "k_positions": mask.k_positions,
        "document_starts": mask.document_starts,
        "k_document_starts": mask.k_document_starts,
    }
