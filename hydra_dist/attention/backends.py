"""The implementations of attention on one device, and which of them ``auto`` takes.

``auto`` goes through an order that is fixed for each compute capability and takes the first backend that works. Where a
mask would be cut into many tiles, the first that takes it whole comes before all that need tiles. Nothing is timed: all
ranks choose the same, and a resumed run chooses what the interrupted one did. Hosts that differ in what is installed
may choose differently; their results still merge, within rounding.

On a GPU a backend is used only after it has done a small piece of work right (``probe``). On the CPU PyTorch's operator
is taken as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch

from hydra_dist.attention import (
    cudnn,
    flash,
    flash_attention_2,
    flash_attention_3,
    flash_attention_4,
    plain,
    probe,
    triton_attention,
)
from hydra_dist.attention.launch import Form, Need
from hydra_dist.attention.probe import Backward, Forward, Where
from hydra_dist.errors import ConfigError, nearest

# Beyond this many pairs of runs of positions the calls, one or more for each pair, cost more than the score matrix of
# such small pieces.
LARGEST_SPAN_PAIRS = 4096


def _as_it_is(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    return dtype


@dataclass(frozen=True)
class Backend:
    """One implementation.

    Attributes:
        name: what ``backend=`` calls it.
        summary: half a sentence for ``explain``.
        refuses: why it cannot run for (device, dtype, head_dim) or takes no mask of a form in one launch, or None. It
            tries nothing, so None is no promise.
        forward: (q [B, R, Hq, D], k and v [B, C, Hk, D], launch) -> out [B, R, Hq, D], lse [B, Hq, R] fp32 or wider.
        backward: (grad_out, q, k, v, out, lse, launch) -> the launch's share of dq, dk and dv, in the dtype of the
            inputs or wider, given the queries' final ``out`` and ``lse`` over all of their keys. ``out`` may be wider
            than the inputs.
        forward_dtype, backward_dtype: what tiles of a dtype are to be converted to beforehand.
        general: it takes every whole mask as the form ``any``, whatever other form the mask has.
    """

    name: str
    summary: str
    refuses: Callable[[torch.device, torch.dtype, int, Form], str | None]
    forward: Forward
    backward: Backward
    forward_dtype: Callable[[torch.device, torch.dtype], torch.dtype] = _as_it_is
    backward_dtype: Callable[[torch.device, torch.dtype], torch.dtype] = _as_it_is
    general: bool = False


class Choice(NamedTuple):
    """A backend, the form in which it takes the whole mask in one launch (None: in tiles), and why it was chosen."""

    backend: Backend
    form: Form | None
    why: str


def _backend(name: str, module: ModuleType, summary: str, **more: Any) -> Backend:
    return Backend(name, summary, module.refuses, module.forward, module.backward, **more)


_BACKENDS = {
    backend.name: backend
    for backend in (
        _backend("flash_attention_4", flash_attention_4, "the package flash-attn-4"),
        _backend("flash_attention_3", flash_attention_3, "the package flash_attn_3"),
        _backend("cudnn", cudnn, "cuDNN through PyTorch's operators"),
        _backend("flash_attention_2", flash_attention_2, "the package flash-attn"),
        _backend(
            "flash",
            flash,
            "PyTorch's fused operators: memory in proportion to the sequence",
            forward_dtype=flash.forward_dtype,
            backward_dtype=flash.backward_dtype,
        ),
        _backend("triton", triton_attention, "this package's Triton kernels", general=True),
        _backend(
            "reference",
            plain,
            "plain attention in fp32 or wider: memory in proportion to the sequence squared",
            forward_dtype=plain.dtype_of,
            backward_dtype=plain.dtype_of,
            general=True,
        ),
    )
}

_WITHOUT_CUDA = ("flash", "reference")
_ORDERS = {
    7: ("flash", "triton", "reference"),
    8: ("flash_attention_2", "flash", "cudnn", "triton", "reference"),
    9: ("flash_attention_4", "flash_attention_3", "cudnn", "flash_attention_2", "flash", "triton", "reference"),
    10: ("flash_attention_4", "cudnn", "flash_attention_2", "flash", "triton", "reference"),
}
"""By the major number of the compute capability: Volta and Turing, Ampere and Ada, Hopper, Blackwell."""


def backends() -> tuple[str, ...]:
    """The names that ``backend=`` takes besides ``auto``."""
    return tuple(_BACKENDS)


def order(device: torch.device) -> tuple[str, ...]:
    """The backends that ``auto`` tries on a device, in order; chips newer than the list go as its last."""
    if not _is_gpu(device):
        return _WITHOUT_CUDA
    major = torch.cuda.get_device_capability(device)[0]
    return _ORDERS[min(max(major, min(_ORDERS)), max(_ORDERS))]


def check(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raise ConfigError for an unknown backend, or one that cannot take the device or dtype. Tries nothing."""
    if backend == "auto":
        return
    if backend not in _BACKENDS:
        known = ("auto", *_BACKENDS)
        raise ConfigError(f'attention backend "{backend}": known are {", ".join(known)}{nearest(backend, known)}')
    forms: tuple[Form, ...] = ("tile", "square", "any")
    reasons = [_BACKENDS[backend].refuses(device, dtype, head_dim, form) for form in forms]
    if None not in reasons:
        raise _refusal(backend, str(reasons[0]), Where(device, dtype, head_dim, 1), Need(None))


def choose(backend: str, where: Where, need: Need) -> Choice:
    """The implementation that ``backend`` names, and why.

    Args:
        backend: ``auto`` or one of ``backends()``.
        where: device, dtype, head_dim and group of the queries.
        need: what the mask asks for.

    Raises:
        ConfigError: an unknown name; a backend that cannot take this, or that did not do its small piece of work right.
    """
    if backend == "auto":
        return _first(where, need)
    check(backend, where.device, where.dtype, where.head_dim)
    chosen = _BACKENDS[backend]
    whole = _whole_reason(chosen, where, need)
    if whole is None:
        return Choice(chosen, _form_for(chosen, need), "asked for")
    tiles = _tiles_reason(chosen, where, need)
    if tiles is None:
        return Choice(chosen, None, "asked for")
    raise _refusal(backend, _both(whole, tiles, need), where, need)


def _first(where: Where, need: Need) -> Choice:
    """What ``auto`` takes."""
    *candidates, reference = (_BACKENDS[name] for name in order(where.device))
    scattered = None
    if need.num_span_pairs > LARGEST_SPAN_PAIRS:
        scattered = f"the positions are scattered ({need.num_span_pairs} pairs of runs, each of which would be a call)"
    # A call on the CPU costs little next to what it computes.
    tiles_too = need.few or not _is_gpu(where.device)
    passed_over: dict[str, str] = {}
    for candidate in candidates:
        whole = _whole_reason(candidate, where, need)
        if whole is None:
            return Choice(candidate, _form_for(candidate, need), _because(where, passed_over))
        tiles = (scattered or _tiles_reason(candidate, where, need)) if tiles_too else None
        if tiles_too and tiles is None:
            return Choice(candidate, None, _because(where, passed_over))
        passed_over[candidate.name] = _both(whole, tiles, need)
    if not tiles_too and scattered is None:
        for candidate in candidates:
            if _tiles_reason(candidate, where, need) is None:
                del passed_over[candidate.name]
                return Choice(
                    candidate, None, f"{_because(where, passed_over)}; in tiles, as none takes such a mask whole"
                )
    reason = _tiles_reason(reference, where, need)
    if reason is not None:
        passed_over[reference.name] = reason
        why = "; ".join(f"{name}: {because}" for name, because in passed_over.items())
        raise ConfigError(f"no attention backend takes this: {why}")
    return Choice(reference, _form_for(reference, need), _because(where, passed_over))


def _because(where: Where, passed_over: dict[str, str]) -> str:
    others = "".join(f"; not {name} ({reason})" for name, reason in passed_over.items())
    return f"the first that takes {where.dtype} on {where.device.type}{others}"


def _both(whole: str, tiles: str | None, need: Need) -> str:
    """One reason of those against the whole mask in one launch and, where they were asked for, against its tiles."""
    if tiles is None or tiles == whole:
        return whole
    return tiles if need.form is None else f"{whole}; in tiles, {tiles}"


def _form_for(backend: Backend, need: Need) -> Form | None:
    """The form in which the backend is to take the whole mask, or None where there are only tiles."""
    return need.form if need.form is None or not backend.general else "any"


def _whole_reason(backend: Backend, where: Where, need: Need) -> str | None:
    """Why the backend cannot take the whole mask in one launch, or None where it can."""
    form = _form_for(backend, need)
    return "there are only tiles" if form is None else _reason(backend, where, form)


def _tiles_reason(backend: Backend, where: Where, need: Need) -> str | None:
    """Why the backend cannot take the mask's tiles, or None where it can."""
    reason = _reason(backend, where, "tile")
    return _reason(backend, where, "edge") if reason is None and need.edges else reason


def _reason(backend: Backend, where: Where, form: Form) -> str | None:
    reason = backend.refuses(where.device, where.dtype, where.head_dim, form)
    if reason is None and _is_gpu(where.device) and backend.name != "reference":
        reason = probe.failure(backend.name, backend.forward, backend.backward, where, form)
    return reason


def _is_gpu(device: torch.device) -> bool:
    """Whether calls are dear and backends have to be tried first."""
    return device.type == "cuda"


def _refusal(backend: str, reason: str, where: Where, need: Need) -> ConfigError:
    others = [_BACKENDS[name] for name in order(where.device) if name != backend]
    works = [
        other.name
        for other in others
        if _whole_reason(other, where, need) is None or _tiles_reason(other, where, need) is None
    ]
    hint = f"; {' or '.join(works)} works" if works else ""
    return ConfigError(f'attention backend "{backend}" cannot be used here: {reason}{hint}')
