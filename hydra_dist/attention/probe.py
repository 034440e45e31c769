"""Whether a backend works here: a small piece of work, forward and backward, compared with the reference.

A package that can be imported may still lack kernels for this chip, take other arguments than it used to, or give
wrong numbers for one head_dim or group size. So each form of mask is tried once for each (device, dtype, head_dim,
group) that is met, and what went wrong is kept as the reason why the backend is not used.

The outcome depends on what is installed, on the chip and on torch's switches, never on the time taken: it is the same
on every rank of equal hosts, and after a resume.
"""

from collections.abc import Callable, Iterator
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from hydra_dist.attention import reference
from hydra_dist.attention.band import Band
from hydra_dist.attention.launch import Form, Launch, launch_of
from hydra_dist.attention.mask import Mask

_BATCH_SIZE, _LENGTH = 2, 160  # more than one block of 128, and not a multiple of it
_SCALE = 0.2


class Where(NamedTuple):
    """What decides whether a backend works: ``group`` is the number of query heads for each key head."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    group: int


Forward = Callable[[Tensor, Tensor, Tensor, Launch], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Launch], tuple[Tensor, Tensor, Tensor]]
"""Those of ``Backend``, which says what they take and give."""


class _Case(NamedTuple):
    what: str
    launch: Launch
    q_length: int
    k_length: int
    allowed: Tensor | None


_known: dict[tuple[str, Where, Form, bool], str | None] = {}
_lock = Lock()


def failure(name: str, forward: Forward, backward: Backward, where: Where, form: Form) -> str | None:
    """Why the backend ``name`` does not work for masks of ``form`` there, or None where it does; found out once.

    Raises:
        torch.OutOfMemoryError: no memory is left to try it. That is not kept, as it says nothing about the backend.
    """
    # head_dim is padded to a multiple of 8 on the way to every kernel, so each stands for the 8 below it.
    where = where._replace(head_dim=where.head_dim + -where.head_dim % 8)
    key = name, where, form, torch.are_deterministic_algorithms_enabled()
    if key not in _known:
        with _lock:  # emulated ranks are threads
            if key not in _known:
                _known[key] = _try(forward, backward, where, form)
    return _known[key]


def forget() -> None:
    """Find everything out anew."""
    with _lock:
        _known.clear()


def _try(forward: Forward, backward: Backward, where: Where, form: Form) -> str | None:
    if where.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"attention meets {where.dtype} with head_dim {where.head_dim} for the first time while a CUDA graph is "
            "captured, and cannot try its backends there; run it once before the capture"
        )
    with torch.no_grad(), torch.inference_mode(False), torch.autocast(where.device.type, enabled=False):
        for case in _cases(form, where.device):
            try:
                reason = _compare(forward, backward, where, case)
            except ImportError as error:
                return f"it cannot be imported: {error}"
            if reason is not None:
                return f"its small piece of work with {case.what} went wrong: {reason}"
    return None


def _compare(forward: Forward, backward: Backward, where: Where, case: _Case) -> str | None:
    q, k, v, grad_out = _inputs(where, case)
    wide_q, wide_k, wide_v, wide_grad = (x.double() for x in (q, k, v, grad_out))
    out, lse = reference.forward(wide_q, wide_k, wide_v, case.allowed, _SCALE)
    grads = reference.backward(wide_grad, wide_q, wide_k, wide_v, out, lse, case.allowed, _SCALE)
    try:
        found = forward(q, k, v, case.launch)
        # The backward gets the reference's results, as it would get those of all keys where these are only some.
        found_grads = backward(grad_out, q, k, v, out.to(where.dtype), lse.float(), case.launch)
    except (torch.OutOfMemoryError, ImportError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    rounding = torch.finfo(where.dtype).eps
    bound = max(3 * rounding, 2e-5)
    return (
        _difference("lse", found[1], lse, max(rounding, 1e-4))
        or _difference("out", found[0], out, bound)
        or _difference("dq", found_grads[0], grads[0], bound)
        or _difference("dk", found_grads[1], grads[1], bound)
        or _difference("dv", found_grads[2], grads[2], bound)
    )


def _difference(name: str, result: Tensor, exact: Tensor, bound: float) -> str | None:
    if result.shape != exact.shape:
        return f"{name} has the shape {list(result.shape)} and not {list(exact.shape)}"
    empty = exact == -torch.inf
    if not torch.equal(empty, result == -torch.inf):
        return f"{name} is -inf elsewhere than where a query sees no key"
    exact, result = exact.masked_fill(empty, 0.0), result.double().masked_fill(empty, 0.0)
    error = ((result - exact).norm() / exact.norm()).item()
    # NaN is no match either.
    return None if error <= bound else f"{name} is off by {error:.2g} of its size, where {bound:.2g} is allowed"


def _inputs(where: Where, case: _Case) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)  # the training's own random numbers stay as they are
    heads = (2 * where.group, 2, 2, 2 * where.group)
    lengths = (case.q_length, case.k_length, case.k_length, case.q_length)
    shapes = [(_BATCH_SIZE, length, count, where.head_dim) for length, count in zip(lengths, heads, strict=True)]
    numbers = (torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") for shape in shapes)
    return [x.to(where.device, where.dtype) for x in numbers]


def _cases(form: Form, device: torch.device) -> Iterator[_Case]:
    if form == "tile":
        causal = Band(_LENGTH, _LENGTH, 0, None).allowed(device)
        yield _Case("all pairs of a tile", Launch(_SCALE), 96, _LENGTH, None)
        yield _Case("a causal tile", Launch(_SCALE, causal=True), _LENGTH, _LENGTH, causal)
        return
    if form == "edge":
        band = Band(96, _LENGTH, 70, 40)
        yield _Case("the edge of a window", Launch(_SCALE, band=band), 96, _LENGTH, band.allowed(device))
        return
    for what, mask, q_length, k_length in _masks(form, device):
        q, k = (torch.empty(_BATCH_SIZE, length, 1, 1, device=device) for length in (q_length, k_length))
        launch = launch_of(mask, form, q, k, _SCALE)
        yield _Case(what, launch, q_length, k_length, mask.allowed(q_length, k_length, device))


def _masks(form: Form, device: torch.device) -> Iterator[tuple[str, Mask, int, int]]:
    starts = torch.tensor([[0] * 1 + [1] * 69 + [70] * 120, [0] * 190], device=device)
    own = starts[:, :_LENGTH]
    if form == "square":
        yield "all pairs", Mask(causal=False), _LENGTH, _LENGTH
        yield "a causal mask", Mask(), _LENGTH, _LENGTH
    elif form == "rectangle":
        yield "all pairs of more keys than queries", Mask(causal=False), 96, _LENGTH
        yield "one query", Mask(causal=False), 1, _LENGTH
    elif form == "window":
        yield "a window", Mask(window=33), _LENGTH, _LENGTH
        # Longer than the widest explicit mask that is ever made along a window's edge.
        yield "a long window", Mask(window=200, q_positions=torch.arange(800, 1100, device=device)), 300, 1100
    elif form == "documents":
        yield "causal documents", Mask(document_starts=own), _LENGTH, _LENGTH
        yield "whole documents", Mask(causal=False, document_starts=own), _LENGTH, _LENGTH
        yield "documents and a window", Mask(window=9, document_starts=own), _LENGTH, _LENGTH
    else:
        yield "a causal mask", Mask(), _LENGTH, _LENGTH
        # Some keys of the sequence, documents of other rows, and late queries that see none of these keys.
        queries, keys = torch.arange(30, 190, device=device), torch.arange(110, device=device)
        keys = keys[(keys < 50) | (keys >= 60)]
        mask = Mask(True, 40, starts[:, queries], starts[:, keys], queries, keys)
        yield "some keys of a sequence", mask, len(queries), len(keys)
