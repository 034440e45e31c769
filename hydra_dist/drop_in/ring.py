"""Ring attention under the names that people look for: of q, k and v alone, as a layer, and as a block."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hydra_dist.context import SequencePlan
from hydra_dist.drop_in.attention import (
    ContextParallelAttention,
    ContextParallelAttentionBlock,
    ContextParallelAttentionConfig,
    Ranks,
    config_from,
    context_of,
)


@dataclass(frozen=True)
class RingAttentionConfig(ContextParallelAttentionConfig):
    """``ContextParallelAttentionConfig`` with the strategy ``ring``."""

    strategy: str = field(default="ring", init=False)


class RingAttention(nn.Module):
    """Attention of q over k and v, all of them local rows; no parameters.

    Args:
        mesh: as for ``hydra_dist.context.ContextParallel``, or a ``ContextParallel``; None: one device.
        layout, inner_ring, timeout: as there.
    """

    def __init__(
        self,
        mesh: Ranks = None,
        layout: str = "zigzag",
        inner_ring: int | None = None,
        timeout: float | None = None,
    ) -> None:
        super().__init__()
        self.context = context_of(mesh, "ring", layout, inner_ring, timeout)

    def plan(self, sequence_length: int, document_starts: Tensor | None = None) -> SequencePlan:
        """Who holds which rows of a batch."""
        return self.context.plan(sequence_length, document_starts)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seq: SequencePlan,
        causal: bool = True,
        window: int | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """q [B, S_local, Hq, D], k and v [B, S_local, Hk, D] -> [B, S_local, Hq, D] (``SequencePlan.attention``)."""
        return seq.attention(q, k, v, causal=causal, window=window, scale=scale)


class RingAttentionLayer(ContextParallelAttention):
    """``ContextParallelAttention`` through the ring."""

    def __init__(self, config: RingAttentionConfig, mesh: Ranks = None) -> None:
        super().__init__(config, mesh)


class RingAttentionBlock(ContextParallelAttentionBlock):
    """``ContextParallelAttentionBlock`` through the ring."""

    def __init__(self, config: RingAttentionConfig, mesh: Ranks = None) -> None:
        super().__init__(config, mesh)


def create_ring_attention(
    hidden_size: int, num_query_heads: int, mesh: Ranks = None, **settings: Any
) -> RingAttentionLayer:
    """A layer from keywords: those of ``RingAttentionConfig``, or of ``ModelConfig``.

    Raises:
        ConfigError: an unknown keyword, or values that do not go together.
    """
    config = config_from(RingAttentionConfig, hidden_size, num_query_heads, settings)
    assert isinstance(config, RingAttentionConfig)
    return RingAttentionLayer(config, mesh)
