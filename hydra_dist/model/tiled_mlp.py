"""The SwiGLU network a tile of rows at a time: no tensor of rows x width of the network exists whole.

Forward keeps the input alone. Backward computes gate and up of a tile again, turns them into the tile's gradients and
goes on to the next; the gradients of the weights add up in fp32 (fp64 for fp64), first tile first.

Two operators share the work, so that activation checkpointing does none of it twice. ``hydra_dist::mlp_inputs`` keeps
what backward needs, computes nothing and returns a token; its gradient is that of the whole network.
``hydra_dist::mlp_tiles`` computes the result and keeps nothing; it hands its gradient on to the token as it is. A
checkpointed layer that is computed again stops at the last tensor that is kept, which is now before the products.
Where torch.compile traces the layer, the products that nobody reads fall out of backward's graph.

Source of the tiling over rows: Jacobs et al. 2025 (ALST, arXiv 2506.13996).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hydra_dist.model.products import add_product, matmul_dtype
from hydra_dist.model.swiglu import gated, gated_gradient


def tiled_mlp(x: Tensor, gate_up: Tensor, down: Tensor, tile_size: int) -> Tensor:
    """down(silu(gate(x)) * up(x)), differentiable once in all three tensors.

    Args:
        x: [..., E].
        gate_up: [2F, E], the gate's rows first.
        down: [E, F].
        tile_size: rows of x whose gate and up exist at once.

    Matrix products run in autocast's dtype where autocast is on, else in x's. Raises ValueError for shapes that do not
    fit and for a tile without rows.

    Returns:
        [..., E] in the dtype of the matrix products.
    """
    if down.ndim != 2 or gate_up.shape != (2 * down.shape[1], x.shape[-1]) or down.shape[0] != x.shape[-1]:
        raise ValueError(
            f"x {tuple(x.shape)}, gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)}: "
            "expected [..., E], [2F, E], [E, F]"
        )
    if tile_size < 1:
        raise ValueError(f"tile_size {tile_size} is not positive")
    dtype = matmul_dtype(x)
    token = torch.ops.hydra_dist.mlp_inputs(x, gate_up, down, tile_size, dtype)
    # Gradients take the way over the token alone.
    return torch.ops.hydra_dist.mlp_tiles(token, x.detach(), gate_up.detach(), down.detach(), tile_size, dtype)


def _tiles(num_rows: int, tile_size: int) -> Iterator[slice]:
    return (slice(start, start + tile_size) for start in range(0, num_rows, tile_size))


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@torch.library.custom_op("hydra_dist::mlp_inputs", mutates_args=())
def _inputs(x: Tensor, gate_up: Tensor, down: Tensor, tile_size: int, dtype: torch.dtype) -> Tensor:
    """A token with the shape of the result and one element's memory."""
    return _token(x, dtype)


@_inputs.register_fake
def _inputs_fake(x: Tensor, gate_up: Tensor, down: Tensor, tile_size: int, dtype: torch.dtype) -> Tensor:
    return _token(x, dtype)


def _token(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_zeros((), dtype=dtype).expand(x.shape)


@torch.library.custom_op("hydra_dist::mlp_tiles", mutates_args=())
def _forward(token: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, tile_size: int, dtype: torch.dtype) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(rows.shape, dtype=dtype)
    with torch.autocast(x.device.type, enabled=False):
        gate_up, down = gate_up.to(dtype), down.to(dtype)
        for tile in _tiles(rows.shape[0], tile_size):
            hidden = gated(functional.linear(rows[tile].to(dtype), gate_up))
            torch.mm(hidden, down.t(), out=out[tile])
    return out.view(x.shape)


@_forward.register_fake
def _forward_fake(
    token: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, tile_size: int, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("hydra_dist::mlp_backward", mutates_args=())
def _gradients(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, tile_size: int, dtype: torch.dtype, needed: list[bool]
) -> list[Tensor]:
    """Gradients of x, gate_up and down; an empty tensor for each that is not ``needed``."""
    rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
    wide = _sum_dtype(dtype)
    grad_x = torch.empty_like(rows, memory_format=torch.contiguous_format) if needed[0] else None
    grad_gate_up, grad_down = (
        torch.zeros_like(weight, dtype=wide) if wanted else None
        for weight, wanted in zip((gate_up, down), needed[1:], strict=True)
    )
    with torch.autocast(x.device.type, enabled=False):
        gate_up_, down_ = gate_up.to(dtype), down.to(dtype)
        for tile in _tiles(rows.shape[0], tile_size):
            part, grad_part = rows[tile].to(dtype), grad_rows[tile].to(dtype)
            both = functional.linear(part, gate_up_)
            if grad_down is not None:
                add_product(grad_down, grad_part.t(), gated(both))
            grad_both = gated_gradient(grad_part @ down_, both)
            del both
            if grad_gate_up is not None:
                add_product(grad_gate_up, grad_both.t(), part)
            if grad_x is not None:
                grad_x[tile] = grad_both @ gate_up_
            del grad_both  # before the next tile's
    return [
        like.new_empty(0) if result is None else result.to(like.dtype).view(like.shape)
        for result, like in ((grad_x, x), (grad_gate_up, gate_up), (grad_down, down))
    ]


@_gradients.register_fake
def _gradients_fake(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, tile_size: int, dtype: torch.dtype, needed: list[bool]
) -> list[Tensor]:
    return [
        like.new_empty(like.shape if wanted else 0) for like, wanted in zip((x, gate_up, down), needed, strict=True)
    ]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.tile_size, ctx.dtype = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:3])
    saved = ctx.saved_tensors
    grads = torch.ops.hydra_dist.mlp_backward(grad, *saved, ctx.tile_size, ctx.dtype, needed)
    return *(grad if wanted else None for grad, wanted in zip(grads, needed, strict=True)), None, None


def _hand_on(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, None, None, None, None, None


def _refuse_second_derivative(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError(
        "the tiled MLP has no second derivative: differentiate once, without create_graph=True, or leave tile_size out"
    )


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


_inputs.register_autograd(_backward, setup_context=_keep)
_forward.register_autograd(_hand_on, setup_context=_keep_nothing)
_gradients.register_autograd(_refuse_second_derivative, setup_context=_keep_nothing)
