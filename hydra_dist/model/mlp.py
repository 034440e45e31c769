"""The gated feed-forward network, SwiGLU: down(silu(gate(x)) * up(x)).

Source: Shazeer 2020 (arXiv 2002.05202), equation 6.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class MLP(nn.Module):
    """SwiGLU whose gate and up projections are one matrix product, gate rows first; no biases."""

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * mlp_size, bias=False)
        self.down = nn.Linear(mlp_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., E]"""
        return self.down(swiglu(self.gate_up(x)))


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2F] = gate | up; keeps only its input for backward, not silu(gate) as well."""
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grads = torch.empty_like(gate_up)
        grad_gate, grad_up = grads.chunk(2, dim=-1)
        grad_up.copy_(functional.silu(gate).mul_(grad))
        grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return grads
