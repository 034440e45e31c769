"""The two causal convolutions of CCGQA over the latent queries and keys, forward and backward, one run of rows.

The first acts on each channel by itself (depthwise, k0 taps), the second mixes the channels of one head (k1 taps);
there is no activation between them, and both have a bias. Only the latent z is padded: before a sequence or a document
z is zero, so the first convolution's output u there is its bias, not zero.

Rows come as [h + n, C], the block's n rows behind the h = k0 + k1 - 2 that they read; ``ages`` [h + n, 1] says how many
rows of its document stand before each, None where no tap leaves its document.

Source: Figliolia et al. 2025 (arXiv 2510.04476), section III and listing A.1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Taps:
    """Weights of both convolutions, the last tap that of the current row: w0 [C, k0], b0 [C], w1 [heads, k1 D, D],
    b1 [heads, D]."""

    w0: Tensor
    b0: Tensor
    w1: Tensor
    b1: Tensor


def depthwise(z: Tensor, ages: Tensor | None, w0: Tensor, b0: Tensor) -> Tensor:
    """[h + n, C] -> u [k1 - 1 + n, C]."""
    size = w0.shape[1]
    length = z.shape[0] - (size - 1)
    u = torch.addcmul(b0, z[size - 1 :], w0[:, -1])
    for delay in range(1, size):
        tap = z[size - 1 - delay :][:length]
        if ages is not None:
            tap = tap.masked_fill(ages[-length:] < delay, 0.0)
        u.addcmul_(tap, w0[:, -1 - delay])
    return u


def columns(u: Tensor, ages: Tensor | None, taps: Taps) -> Tensor:
    """u [k1 - 1 + n, C] -> [heads, n, k1 D], the taps of each row side by side; u before a document is its bias."""
    num_heads, head_dim = taps.b1.shape
    size = taps.w1.shape[1] // head_dim
    length = u.shape[0] - (size - 1)
    pieces = []
    for delay in reversed(range(size)):
        tap = u[size - 1 - delay :][:length]
        if ages is not None and delay:
            tap = torch.where(ages[-length:] >= delay, tap, taps.b0.to(u.dtype))
        pieces.append(tap.unflatten(-1, (num_heads, head_dim)))
    return (pieces[0] if size == 1 else torch.cat(pieces, dim=-1)).transpose(0, 1)


def convolve(z: Tensor, ages: Tensor | None, taps: Taps, dtype: torch.dtype) -> Tensor:
    """[h + n, C] -> y [n, heads, D]; u and the matrix products are in ``dtype``."""
    u = depthwise(z, ages, taps.w0.to(z.dtype), taps.b0.to(z.dtype)).to(dtype)
    y = torch.baddbmm(taps.b1.to(dtype).unsqueeze(1), columns(u, ages, taps), taps.w1.to(dtype))
    return y.transpose(0, 1).contiguous()


def convolve_backward(
    dy: Tensor, z: Tensor, ages: Tensor | None, taps: Taps, dtype: torch.dtype, dz: Tensor, grad_taps: Taps
) -> None:
    """Add to dz [h + n, C] and to the gradients of the taps (but for b0, which follows from b1)."""
    wide, length = dy.dtype, dy.shape[0]
    head_dim = taps.b1.shape[1]
    w0 = taps.w0.to(wide)
    sizes = w0.shape[1], taps.w1.shape[1] // head_dim
    cols = columns(depthwise(z, ages, w0, taps.b0.to(wide)).to(dtype), ages, taps)
    dy_heads = dy.to(dtype).transpose(0, 1)
    grad_taps.w1.add_(cols.transpose(1, 2) @ dy_heads)
    grad_taps.b1.add_(dy.sum(0))
    du = dy.new_zeros(sizes[1] - 1 + length, dz.shape[1])
    for delay in range(sizes[1]):
        weight = taps.w1[:, (sizes[1] - 1 - delay) * head_dim :][:, :head_dim].to(dtype)
        part = (dy_heads @ weight.transpose(1, 2)).transpose(0, 1).flatten(1)
        if ages is not None and delay:
            part = part.masked_fill(ages[-length:] < delay, 0.0)
        du[sizes[1] - 1 - delay :][:length] += part
    length = du.shape[0]
    for delay in range(sizes[0]):
        part = du
        if ages is not None and delay:
            part = du.masked_fill(ages[-length:] < delay, 0.0)
        rows = slice(sizes[0] - 1 - delay, sizes[0] - 1 - delay + length)
        grad_taps.w0[:, -1 - delay] += torch.linalg.vecdot(part, z[rows], dim=0)
        dz[rows].addcmul_(part, w0[:, -1 - delay])
