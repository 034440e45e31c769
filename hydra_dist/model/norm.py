"""Root-mean-square normalisation: of the residual stream (with a learned weight) and of single heads.

One operator serves both. It keeps its input and one number a row for backward, computes in fp32 (fp64 for fp64)
whatever it is given, and writes the dtype that the next matrix product reads, so that under autocast no fp32 copy is
kept.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hydra_dist.model.products import matmul_dtype


def rms_normalize(x: Tensor, scale: Tensor | None, eps: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last dimension.

    Args:
        x: [..., N], any floating dtype.
        scale: broadcast against x ([N] for a norm's weight, [heads, 1] for one factor a head), or None.
        eps: added to the mean square.
        out_dtype: of the result; None keeps x's.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4.
    """
    return _RMSNormalize.apply(x, scale, eps, out_dtype or x.dtype)


class _RMSNormalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, eps: float, out_dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, inverse)
        y = x * inverse
        if scale is not None:
            y = y.mul_(scale)
        return y.to(out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, scale, inverse = ctx.saved_tensors
        grad = grad.to(inverse.dtype)
        y = x * inverse
        grad_x = grad_scale = None
        if scale is not None and ctx.needs_input_grad[1]:
            grad_scale = (grad * y).sum_to_size(scale.shape).to(scale.dtype)
        if ctx.needs_input_grad[0]:
            scaled = grad if scale is None else grad * scale
            # d/dx of x * inverse: what points along y only changes the length, which the norm takes away.
            along = (scaled * y).mean(-1, keepdim=True)
            grad_x = torch.addcmul(scaled, y, along, value=-1).mul_(inverse).to(x.dtype)
        return grad_x, grad_scale, None, None


class RMSNorm(nn.Module):
    """RMSNorm with a learned weight over the last dimension, ready for the matrix product that follows it."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size], in autocast's dtype where autocast is on."""
        return rms_normalize(x, self.weight, self.eps, matmul_dtype(x))
