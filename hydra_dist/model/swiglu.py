"""SwiGLU's activation, silu(gate) * up, and its gradient.

Source: Shazeer 2020 (arXiv 2002.05202), equation 6.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2F] = gate | up; keeps only its input for backward, not silu(gate) as well."""
    return _SwiGLU.apply(gate_up)


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2F] = gate | up; not for autograd."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def gated_gradient(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient [..., 2F] of gate | up, from that of ``gated``'s result [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    grads = torch.empty_like(gate_up)
    grad_gate, grad_up = grads.chunk(2, dim=-1)
    grad_up.copy_(functional.silu(gate).mul_(grad))
    grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    return grads


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return gated(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return gated_gradient(grad, gate_up)
