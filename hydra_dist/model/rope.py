"""Rotary position embedding on the first dimensions of each head.

Dimension i is paired with i + rope_dim/2 (half-split, "NeoX" pairing) and the pair is turned by the angle
position x theta^(-2i/rope_dim); the dimensions after ``rope_dim`` stay as they are.
"""

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]
"""Cosines and sines, each [S, 1, rope_dim/2]; built once a forward and shared by the layers."""


def rope_tables(positions: Tensor, rope_dim: int, theta: float, dtype: torch.dtype) -> Rope | None:
    """Cosine and sine tables for global ``positions`` [S]; None where nothing is rotated (``rope_dim`` 0).

    Angles are computed in fp64: at position 1,000,000 an fp32 product is off by up to 0.06 radians. The tables come
    back in fp32 (fp64 for an fp64 model).

    Source: Su et al. 2021 (arXiv 2104.09864), equation 34.
    """
    if rope_dim == 0:
        return None
    steps = torch.arange(0, rope_dim, 2, device=positions.device, dtype=torch.float64)
    angles = torch.outer(positions.to(torch.float64), theta ** (-steps / rope_dim)).unsqueeze(1)
    dtype = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rope: Rope | None) -> Tensor:
    """Rotate ``x`` [B, S, H, D]; the result has the wider of x's and the tables' dtype."""
    if rope is None:
        return x
    cosines, sines = rope
    half = cosines.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines, rest], dim=-1)
