"""The gated feed-forward network, SwiGLU: down(silu(gate(x)) * up(x)), over all rows at once or tile by tile.

Source: Shazeer 2020 (arXiv 2002.05202), equation 6.
"""

from collections.abc import Callable

from torch import Tensor, nn

from hydra_dist.model.swiglu import swiglu
from hydra_dist.model.tiled_mlp import tiled_mlp


class MLP(nn.Module):
    """SwiGLU whose gate and up projections are one matrix product, gate rows first; no biases.

    Args:
        tile_size: rows, of batch x sequence, whose gate, up and product exist at once, forward and backward; backward
            computes gate and up again. None: all rows, whose gate, up and product are kept for backward.
    """

    def __init__(self, hidden_size: int, mlp_size: int, tile_size: int | None = None) -> None:
        super().__init__()
        self.tile_size = tile_size
        linear = nn.Linear if tile_size is None else _LendingLinear
        self.gate_up = linear(hidden_size, 2 * mlp_size, bias=False)
        self.down = linear(mlp_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., E]"""
        tile_size = self.tile_size
        if tile_size is None:
            return self.down(swiglu(self.gate_up(x)))
        # ZeRO-3 has a weight whole while its own module runs, forward and backward, so the operator runs inside both.
        return self.gate_up(x, lambda x, gate_up: self.down(x, lambda x, down: tiled_mlp(x, gate_up, down, tile_size)))


class _LendingLinear(nn.Linear):
    """A linear layer whose weight another computation reads, which runs inside this module's forward."""

    def forward(self, x: Tensor, borrower: Callable[[Tensor, Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        return borrower(x, self.weight)
