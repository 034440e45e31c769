"""In which dtype matrix products run, and sums of products that are wider than their factors."""

import torch
from torch import Tensor


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of ``x`` runs here: autocast's where it is on (fp64 stays), else x's."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; ``total`` may be wider than the factors."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        total += left @ right
