"""Compressed convolutional grouped-query attention: attention that runs whole in a narrow latent.

Queries, keys and values are plain down-projections of the residual stream, in one matrix product. What happens to them
before attention (convolutions, q-k-mean, q-k-norm, rotation, value shift) is ``prologue.py``. One up-projection leads
back. ``ccgqa_reference.py`` has the same layer written row by row.

Source: Figliolia et al. 2025 (arXiv 2510.04476), section III and listing A.1.
"""

from torch import Tensor, nn

from hydra_dist.model.gqa import check_heads
from hydra_dist.model.norm import RMSNorm
from hydra_dist.model.prologue import Prologue
from hydra_dist.model.rope import Rope, rope_tables
from hydra_dist.model.sequence import LocalSequence, WholeSequence


class CCGQA(nn.Module):
    """The attention layer, [B, S, E] -> [B, S, E].

    Args:
        hidden_size: model width E.
        num_query_heads, num_key_heads, head_dim: Hq, Hk, D of the latent; query head h reads key head h // (Hq / Hk).
        conv_kernel_sizes: taps of the depthwise and of the head-grouped convolution.
        use_convs: without, the latents go on as they are.
        use_qk_mean, use_qk_norm, use_value_shift, temperature: see ``Prologue``.
        use_output_norm: RMSNorm over what attention gives, before the up-projection. Not part of the paper, and not of
            released checkpoints.
        norm_eps: of that norm.
        rope_dim: dimensions of a head that are rotated, after the norm; None: half of them.
        window: a row sees itself and window - 1 rows before it; None: all rows before it.

    Raises:
        ConfigError: heads that do not group, an odd head_dim, fewer than one tap, or an unknown temperature.
    """

    def __init__(
        self,
        hidden_size: int,
        num_query_heads: int,
        num_key_heads: int,
        head_dim: int,
        conv_kernel_sizes: tuple[int, int] = (2, 2),
        use_convs: bool = True,
        use_qk_mean: bool = True,
        use_qk_norm: bool = True,
        use_value_shift: bool = True,
        *,
        temperature: str = "exp",
        use_output_norm: bool = False,
        norm_eps: float = 1e-6,
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
        self.use_value_shift = use_value_shift
        self.latent_size = (num_query_heads + num_key_heads) * head_dim
        self.value_size = num_key_heads * head_dim
        self.down = nn.Linear(hidden_size, self.latent_size + self.value_size, bias=False)
        self.prologue = Prologue(
            num_query_heads,
            num_key_heads,
            head_dim,
            conv_kernel_sizes if use_convs else None,
            use_qk_mean,
            use_qk_norm,
            use_value_shift,
            temperature,
        )
        self.output_norm = RMSNorm(num_query_heads * head_dim, norm_eps) if use_output_norm else None
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
        q, k, v = self.queries_keys_values(x, seq, rope)
        bound = self.prologue.logit_bound()
        rows = seq.attention(q, k, v, causal=True, window=self.window, logit_bound=bound).flatten(2)
        return self.output(rows if self.output_norm is None else self.output_norm(rows))

    def queries_keys_values(
        self, x: Tensor, seq: LocalSequence | None = None, rope: Rope | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What attention takes: q [B, S, Hq, D], k and v [B, S, Hk, D]; arguments as for ``forward``."""
        if seq is None:
            seq = WholeSequence(x.shape[1], x.device)
        if rope is None:
            rope = rope_tables(seq.positions.to(x.device), self.rope_dim, self.rope_theta, x.dtype)
        p = self.down(x)
        ages = None if seq.ages is None else seq.ages.to(x.device)
        handle = seq.halo_handle
        before = (None, None) if handle is not None else self._rows_before(seq, p)
        return self.prologue(p, *before, ages, seq.chunk_lengths, rope, handle)

    def _rows_before(self, seq: LocalSequence, p: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What comes from before each chunk, in one request: rows for the convolutions, a row for the value shift."""
        num_rows = self.prologue.num_rows_before
        wanted = [(p[..., : self.latent_size], num_rows)] if num_rows else []
        wanted += [(p[..., self.latent_size + self.value_size // 2 :], 1)] if self.use_value_shift else []
        rows = seq.halo(wanted) if wanted else []
        return rows[0] if num_rows else None, rows[-1] if self.use_value_shift else None
