"""The implementations of attention on one device, and which of them ``auto`` takes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_dist.attention import flash, reference
from hydra_dist.attention.band import Band
from hydra_dist.errors import ConfigError, nearest

# Beyond this many pairs of runs of positions the flash backend's calls, one or more for each pair, cost more than the
# score matrix of such small pieces.
LARGEST_SPAN_PAIRS = 4096


@dataclass(frozen=True)
class Backend:
    """How one implementation computes a tile; the arguments are those of ``flash.forward`` and ``flash.backward``.

    ``refuses`` gives the reason why it cannot take (device, dtype, head_dim), or None. ``forward_dtype`` and
    ``backward_dtype`` give the dtype that inputs are to be converted to beforehand.
    """

    name: str
    summary: str
    refuses: Callable[[torch.device, torch.dtype, int], str | None]
    forward_dtype: Callable[[torch.device, torch.dtype], torch.dtype]
    backward_dtype: Callable[[torch.device, torch.dtype], torch.dtype]
    forward: Callable[[Tensor, Tensor, Tensor, bool, Band | None, float], tuple[Tensor, Tensor]]
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, Band | None, float], tuple[Tensor, Tensor, Tensor]
    ]


def _reference_refuses(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return None if dtype.is_floating_point and dtype.itemsize >= 2 else f"attention takes no {dtype}"


def _reference_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _allowed(q: Tensor, k: Tensor, causal: bool, band: Band | None) -> Tensor | None:
    if causal:
        band = Band(q.shape[1], k.shape[1], 0, None)
    return None if band is None else band.allowed(q.device)


def _reference_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, band: Band | None, scale: float
) -> tuple[Tensor, Tensor]:
    return reference.forward(q, k, v, _allowed(q, k, causal, band), scale)


def _reference_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    band: Band | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.backward(grad_out, q, k, v, out, lse, _allowed(q, k, causal, band), scale)


_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "flash",
            "PyTorch's fused operators: memory in proportion to the sequence",
            flash.refuses,
            flash.forward_dtype,
            flash.backward_dtype,
            flash.forward,
            flash.backward,
        ),
        Backend(
            "reference",
            "plain attention in fp32 or wider: memory in proportion to the sequence squared",
            _reference_refuses,
            _reference_dtype,
            _reference_dtype,
            _reference_forward,
            _reference_backward,
        ),
    )
}


def backends() -> tuple[str, ...]:
    """The names that ``backend=`` takes besides ``auto``, in the order in which ``auto`` tries them."""
    return tuple(_BACKENDS)


def resolve(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """The implementation that ``backend`` names for such inputs; see ``choose`` for the errors."""
    return choose(backend, device, dtype, head_dim)[0]


def choose(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, num_span_pairs: int = 1
) -> tuple[Backend, str]:
    """The implementation that ``backend`` names, and why.

    Args:
        backend: ``auto`` or one of ``backends()``.
        device, dtype, head_dim: of the queries.
        num_span_pairs: runs of consecutive positions of the queries times those of the keys.

    Raises:
        ConfigError: an unknown name; a backend that cannot take the device or dtype.
    """
    if backend != "auto":
        if backend not in _BACKENDS:
            known = ("auto", *_BACKENDS)
            raise ConfigError(f'attention backend "{backend}": known are {", ".join(known)}{nearest(backend, known)}')
        chosen = _BACKENDS[backend]
        reason = chosen.refuses(device, dtype, head_dim)
        if reason is not None:
            works = [name for name, other in _BACKENDS.items() if other.refuses(device, dtype, head_dim) is None]
            hint = f"; {' or '.join(works)} works" if works else ""
            raise ConfigError(f'attention backend "{backend}" cannot be used here: {reason}{hint}')
        return chosen, "asked for"
    passed_over: list[tuple[str, str]] = []
    for name, candidate in _BACKENDS.items():
        reason = candidate.refuses(device, dtype, head_dim)
        if reason is None and name == "flash" and num_span_pairs > LARGEST_SPAN_PAIRS:
            reason = f"the positions are scattered ({num_span_pairs} pairs of runs, each of which would be a call)"
        if reason is None:
            why = "".join(f"; not {other} ({because})" for other, because in passed_over)
            return candidate, f"the first that takes {dtype} on {device.type}{why}"
        passed_over.append((name, reason))
    raise ConfigError(f"no attention backend takes this: {'; '.join(f'{name}: {why}' for name, why in passed_over)}")
