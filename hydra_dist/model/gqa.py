"""Grouped-query attention; as many key heads as query heads is multi-head, one key head multi-query attention.

Source: Ainslie et al. 2023 (arXiv 2305.13245).
"""

from torch import Tensor, nn

from hydra_dist.errors import ConfigError
from hydra_dist.model.rope import Rope, rope_tables, rotate
from hydra_dist.model.sequence import LocalSequence, WholeSequence


class GQA(nn.Module):
    """Causal softmax attention with scale 1/sqrt(D); query head h reads key head h // (Hq / Hk). No biases.

    Args:
        hidden_size: model width E.
        rope_dim: dimensions of a head that are rotated; None: half of them.
        window: a row sees itself and window - 1 rows before it; None: all rows before it.
    """

    def __init__(
        self,
        hidden_size: int,
        num_query_heads: int,
        num_key_heads: int,
        head_dim: int,
        *,
        rope_dim: int | None = None,
        rope_theta: float = 10_000.0,
        window: int | None = None,
    ) -> None:
        super().__init__()
        check_heads(num_query_heads, num_key_heads, head_dim)
        self.num_query_heads, self.num_key_heads, self.head_dim = num_query_heads, num_key_heads, head_dim
        self.rope_dim = head_dim // 4 * 2 if rope_dim is None else rope_dim
        self.rope_theta = rope_theta
        self.window = window
        self.qkv = nn.Linear(hidden_size, (num_query_heads + 2 * num_key_heads) * head_dim, bias=False)
        self.output = nn.Linear(num_query_heads * head_dim, hidden_size, bias=False)

    def forward(self, x: Tensor, seq: LocalSequence | None = None, rope: Rope | None = None) -> Tensor:
        """Local rows in and out.

        Args:
            x: [B, S, E].
            seq: where the local rows stand in the sequence; None: one device, one document.
            rope: tables for ``seq.positions`` (``rope_tables``); None computes them.
        """
        if seq is None:
            seq = WholeSequence(x.shape[1], x.device)
        if rope is None:
            rope = rope_tables(seq.positions.to(x.device), self.rope_dim, self.rope_theta, x.dtype)
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.num_query_heads, self.num_key_heads, self.num_key_heads], dim=2)
        q, k = rotate(q, rope).to(v.dtype), rotate(k, rope).to(v.dtype)
        # A view would keep the whole projection, queries and keys from before their rotation included, for backward.
        v = v.contiguous()
        return self.output(seq.attention(q, k, v, causal=True, window=self.window).flatten(2))


def check_heads(num_query_heads: int, num_key_heads: int, head_dim: int) -> None:
    """Refuse head counts that do not group, and head sizes that do not pair."""
    if num_key_heads < 1 or num_query_heads % num_key_heads:
        raise ConfigError(
            f"num_query_heads {num_query_heads} is not a multiple of num_key_heads {num_key_heads}; "
            f"{max(1, num_key_heads) * max(1, num_query_heads // max(1, num_key_heads))} query heads work"
        )
    if head_dim < 2 or head_dim % 2:
        raise ConfigError(f"head_dim {head_dim} is not a positive even number; {max(2, head_dim + 1)} works")
