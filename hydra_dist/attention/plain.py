"""The reference as a backend: every mask in one launch, on every device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hydra_dist.attention import reference
from hydra_dist.attention.band import Band
from hydra_dist.attention.launch import Form, Launch


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int, form: Form) -> str | None:
    """Why the reference cannot take this, or None where it can."""
    return None if dtype.is_floating_point and dtype.itemsize >= 2 else f"attention takes no {dtype}"


def dtype_of(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What inputs of ``dtype`` are computed in."""
    return torch.promote_types(dtype, torch.float32)


def forward(q: Tensor, k: Tensor, v: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    """One launch, as ``Backend.forward``."""
    with _as_written(q):
        return reference.forward(q, k, v, _allowed(q, k, launch), launch.scale)


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch, as ``Backend.backward``."""
    with _as_written(q):
        return reference.backward(grad_out, q, k, v, out, lse, _allowed(q, k, launch), launch.scale)


def _allowed(q: Tensor, k: Tensor, launch: Launch) -> Tensor | None:
    if launch.mask is not None:
        return launch.mask.allowed(q.shape[1], k.shape[1], q.device)
    assert launch.documents is None
    band = Band(q.shape[1], k.shape[1], 0, None) if launch.causal else launch.band
    return None if band is None else band.allowed(q.device)


@contextmanager
def _as_written(q: Tensor) -> Iterator[None]:
    """Autocast would compute the reference's products in half precision."""
    if torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):
            yield
    else:
        yield
