"""The CCGQA prologue as one differentiable PyTorch operator.

``hydra_dist::ccgqa_prologue`` and ``hydra_dist::ccgqa_prologue_backward`` are custom operators, so that torch.compile,
activation checkpointing and profilers see one node each, whatever runs inside: Triton kernels on a GPU, plain PyTorch
(``prologue_plain``) elsewhere and where it is asked for.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hydra_dist.errors import ConfigError, nearest
from hydra_dist.model import prologue_pairs, prologue_plain
from hydra_dist.model.convolution import Taps
from hydra_dist.model.prologue_plain import Switches

BACKENDS = ("triton", "plain")


def prologue(
    p: Tensor,
    z_before: Tensor | None,
    v_before: Tensor | None,
    ages: Tensor | None,
    chunk_lengths: Sequence[int],
    taps: Taps | None,
    beta: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    switches: Switches,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """``prologue_plain.forward``, differentiable once: q [B, S, Hq, D], k and v [B, S, Hk, D].

    ``backend``: ``auto`` (see ``choose``), ``triton`` or ``plain``. ``beta`` must not be zero where a gradient is
    wanted. The rotation and ``ages`` have no gradient.
    """
    none = (None,) * 4
    w0, b0, w1, b1 = none if taps is None else (taps.w0, taps.b0, taps.w1, taps.b1)
    cosines, sines = (None, None) if rope is None else rope
    v_before = v_before if switches.value_shift else None
    tensors = (p, z_before, v_before, ages, w0, b0, w1, b1, beta, cosines, sines)
    q, k, v, _ = torch.ops.hydra_dist.ccgqa_prologue(*tensors, list(chunk_lengths), *plain_values(switches), backend)
    return q, k, v


def choose(backend: str, device: torch.device, dtype: torch.dtype, switches: Switches) -> tuple[str, str]:
    """The implementation that ``backend`` names for such inputs, and why.

    Raises ConfigError for an unknown name, and for ``triton`` where the kernels cannot take the inputs.
    """
    if backend == "plain":
        return "plain", "asked for"
    if backend not in ("auto", "triton"):
        known = ("auto", *BACKENDS)
        raise ConfigError(f'prologue backend "{backend}": known are {", ".join(known)}{nearest(backend, known)}')
    reason = _kernels_refuse(device, dtype, switches)
    if reason is None:
        return "triton", "asked for" if backend == "triton" else f"the kernels take {dtype} on {device.type}"
    if backend == "triton":
        raise ConfigError(f'prologue backend "triton" cannot be used here: {reason}; plain works')
    return "plain", f"not triton ({reason})"


def _kernels_refuse(device: torch.device, dtype: torch.dtype, switches: Switches) -> str | None:
    if device.type != "cuda":
        return f"Triton kernels do not run on {device.type}"
    from hydra_dist.kernels import ccgqa_prologue_forward

    return ccgqa_prologue_forward.refuses(device, dtype, switches.head_dim, switches.kernel_sizes)


def plain_values(switches: Switches) -> tuple[int, int, int, list[int], bool, float | None, bool]:
    """``switches`` as the operators take them."""
    return (
        switches.num_query_heads,
        switches.num_key_heads,
        switches.head_dim,
        list(switches.kernel_sizes),
        switches.use_qk_mean,
        switches.eps,
        switches.value_shift,
    )


def _of_kernels(switches: Switches) -> dict[str, Any]:
    """``switches`` as the launchers take them."""
    return {
        "num_query_heads": switches.num_query_heads,
        "num_key_heads": switches.num_key_heads,
        "head_dim": switches.head_dim,
        "kernel_sizes": switches.kernel_sizes,
        "use_qk_mean": switches.use_qk_mean,
        "eps": switches.eps,
        "value_shift": switches.value_shift,
    }


def _switches(
    num_query_heads: int,
    num_key_heads: int,
    head_dim: int,
    kernel_sizes: list[int],
    use_qk_mean: bool,
    eps: float | None,
    value_shift: bool,
) -> Switches:
    sizes = (kernel_sizes[0], kernel_sizes[1])
    return Switches(num_query_heads, num_key_heads, head_dim, sizes, use_qk_mean, eps, value_shift)


def _taps(w0: Tensor | None, b0: Tensor | None, w1: Tensor | None, b1: Tensor | None) -> Taps | None:
    if w0 is None or b0 is None or w1 is None or b1 is None:
        return None
    return Taps(w0, b0, w1, b1)


@torch.library.custom_op("hydra_dist::ccgqa_prologue", mutates_args=())
def _prologue(
    p: Tensor,
    z_before: Tensor | None,
    v_before: Tensor | None,
    ages: Tensor | None,
    w0: Tensor | None,
    b0: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    beta: Tensor | None,
    cosines: Tensor | None,
    sines: Tensor | None,
    chunk_lengths: list[int],
    num_query_heads: int,
    num_key_heads: int,
    head_dim: int,
    kernel_sizes: list[int],
    use_qk_mean: bool,
    eps: float | None,
    value_shift: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    switches = _switches(num_query_heads, num_key_heads, head_dim, kernel_sizes, use_qk_mean, eps, value_shift)
    if choose(backend, p.device, p.dtype, switches)[0] == "triton":
        from hydra_dist.kernels import ccgqa_prologue_forward

        compute: Callable[..., Any] = partial(ccgqa_prologue_forward.forward, **_of_kernels(switches))
        rows = (p, z_before, v_before, ages, chunk_lengths)
        if len(chunk_lengths) > prologue_pairs.AT_ONCE:
            return prologue_pairs.forward(compute, *rows, (w0, b0, w1, b1, beta), cosines, sines)
        whole: tuple[Tensor, Tensor, Tensor, Tensor] = compute(*rows, w0, b0, w1, b1, beta, cosines, sines)
        return whole
    rope = None if cosines is None or sines is None else (cosines, sines)
    rows = (p, z_before, v_before, ages, chunk_lengths)
    return prologue_plain.forward(*rows, _taps(w0, b0, w1, b1), beta, rope, switches)


@_prologue.register_fake
def _prologue_fake(p: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_query_heads, num_key_heads, head_dim, _, _, eps, _, _ = rest[-8:]
    rows = p.shape[:2]
    inv_shape = (*rows, num_query_heads + num_key_heads) if eps is not None else (0,)
    keys = (*rows, num_key_heads, head_dim)
    inv = p.new_empty(inv_shape, dtype=torch.promote_types(p.dtype, torch.float32))
    return p.new_empty(*rows, num_query_heads, head_dim), p.new_empty(keys), p.new_empty(keys), inv


@torch.library.custom_op("hydra_dist::ccgqa_prologue_backward", mutates_args=())
def _prologue_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    q: Tensor,
    k: Tensor,
    inv: Tensor,
    p: Tensor,
    z_before: Tensor | None,
    v_before: Tensor | None,
    ages: Tensor | None,
    w0: Tensor | None,
    b0: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    beta: Tensor | None,
    cosines: Tensor | None,
    sines: Tensor | None,
    chunk_lengths: list[int],
    num_query_heads: int,
    num_key_heads: int,
    head_dim: int,
    kernel_sizes: list[int],
    use_qk_mean: bool,
    eps: float | None,
    value_shift: bool,
    backend: str,
) -> list[Tensor]:
    """Gradients of p, z_before, v_before, w0, b0, w1, b1 and beta; an empty tensor for each that was None."""
    switches = _switches(num_query_heads, num_key_heads, head_dim, kernel_sizes, use_qk_mean, eps, value_shift)
    grads = (grad_q, grad_k, grad_v, q, k, inv, p, z_before, v_before, ages, chunk_lengths)
    results: tuple[Tensor | None, ...]
    if choose(backend, p.device, p.dtype, switches)[0] == "triton":
        from hydra_dist.kernels import ccgqa_prologue_backward

        compute: Callable[..., Any] = partial(ccgqa_prologue_backward.backward, **_of_kernels(switches))
        if len(chunk_lengths) > prologue_pairs.AT_ONCE:
            of_rows = (grad_q, grad_k, grad_v, q, k, inv, p)
            halos = (z_before, v_before, ages, chunk_lengths)
            results = tuple(prologue_pairs.backward(compute, of_rows, *halos, (w0, b0, w1, beta), cosines, sines))
        else:
            results = compute(*grads, w0, b0, w1, beta, cosines, sines)
    else:
        rope = None if cosines is None or sines is None else (cosines, sines)
        *rows, taps, grad_beta = prologue_plain.backward(*grads, _taps(w0, b0, w1, b1), beta, rope, switches)
        results = (*rows, *((None,) * 4 if taps is None else (taps.w0, taps.b0, taps.w1, taps.b1)), grad_beta)
    inputs = (p, z_before, v_before, w0, b0, w1, b1, beta)
    return [
        p.new_empty(0) if grad is None or x is None else grad.to(x.dtype)
        for grad, x in zip(results, inputs, strict=True)
    ]


@_prologue_backward.register_fake
def _prologue_backward_fake(*args: Any) -> list[Tensor]:
    p, z_before, v_before, _, w0, b0, w1, b1, beta = args[6:15]
    return [
        p.new_empty(0) if x is None else x.new_empty(x.shape) for x in (p, z_before, v_before, w0, b0, w1, b1, beta)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, _, inv = output
    ctx.mark_non_differentiable(inv)
    ctx.save_for_backward(q, k, inv, *inputs[:11])
    ctx.plain = inputs[11:]


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, grad_inv: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    grads = torch.ops.hydra_dist.ccgqa_prologue_backward(grad_q, grad_k, grad_v, *saved, *ctx.plain)
    inputs = saved[3:]
    order = (0, 1, 2, 4, 5, 6, 7, 8)  # of p, z_before, v_before, w0, b0, w1, b1, beta among the inputs
    by_input = dict(zip(order, grads, strict=True))
    tensors = [by_input[i] if i in by_input and inputs[i] is not None else None for i in range(len(inputs))]
    return *tensors, *(None for _ in ctx.plain)


def _refuse_second_derivative(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError(
        "the CCGQA prologue has no second derivative: differentiate once, without create_graph=True, or compute this "
        "part with plain tensor operations"
    )


_prologue.register_autograd(_backward, setup_context=_setup_context)
_prologue_backward.register_autograd(_refuse_second_derivative, setup_context=lambda ctx, inputs, output: None)
