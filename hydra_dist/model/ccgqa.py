"""Compressed convolutional grouped-query attention: attention that runs whole in a narrow latent.

Queries, keys and values are plain down-projections of the residual stream. The latent queries and keys pass two causal
convolutions, get the average of the un-convolved query and key of their group added back (q-k-mean), and are normalised
head by head (q-k-norm) with a learned temperature on the keys. Half of the value channels come from the row before
(value shift). One up-projection leads back. ``ccgqa_reference.py`` has the same layer written row by row.

Source: Figliolia et al. 2025 (arXiv 2510.04476), section III and listing A.1.
"""

import torch
from torch import Tensor, nn

from hydra_dist.errors import ConfigError
from hydra_dist.model.convolution import CausalConvolutions, drop_rows_between, with_rows_before
from hydra_dist.model.gqa import check_heads
from hydra_dist.model.norm import rms_normalize
from hydra_dist.model.rope import Rope, rope_tables, rotate
from hydra_dist.model.sequence import LocalSequence, WholeSequence

NORM_EPS = 1e-12
"""Added to a head's squared length: only keeps the length of a zero vector from being divided by."""


class QKNorm(nn.Module):
    """Every query and key head scaled to length sqrt(D), keys also by exp(tau), one tau a key head.

    A logit is therefore at most exp(tau) sqrt(D). tau starts at 0, where its gradient is not zero.
    """

    def __init__(self, num_key_heads: int, head_dim: int) -> None:
        super().__init__()
        self.eps = NORM_EPS / head_dim
        self.tau = nn.Parameter(torch.zeros(num_key_heads))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, Hq, D], [B, S, Hk, D] -> the same in fp32 or wider."""
        wide = torch.promote_types(q.dtype, torch.float32)
        temperature = self.tau.to(wide).exp().unsqueeze(-1)
        return rms_normalize(q, None, self.eps, wide), rms_normalize(k, temperature, self.eps, wide)


class CCGQA(nn.Module):
    """The attention layer, [B, S, E] -> [B, S, E].

    Args:
        hidden_size: model width E.
        num_query_heads, num_key_heads, head_dim: Hq, Hk, D of the latent; query head h reads key head h // (Hq / Hk).
        conv_kernel_sizes: taps of the depthwise and of the head-grouped convolution.
        use_convs: without, the latents go on as they are.
        use_qk_mean: add the un-convolved average of each query head and its key head.
        use_qk_norm: without, logits are plain q k / sqrt(D), and there is no temperature.
        use_value_shift: the second half of the value channels is that of the row before (zero at a document's first
            row). With an odd number of key heads the cut goes through the middle of a head.
        rope_dim: dimensions of a head that are rotated, after the norm; None: half of them.
        window: a row sees itself and window - 1 rows before it; None: all rows before it.

    Raises:
        ConfigError: heads that do not group, an odd head_dim, or fewer than one tap.
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
        rope_dim: int | None = None,
        rope_theta: float = 10_000.0,
        window: int | None = None,
    ) -> None:
        super().__init__()
        check_heads(num_query_heads, num_key_heads, head_dim)
        if len(conv_kernel_sizes) != 2 or min(conv_kernel_sizes) < 1:
            raise ConfigError(f"conv_kernel_sizes {tuple(conv_kernel_sizes)} is not two positive numbers; (2, 2) works")
        self.num_query_heads, self.num_key_heads, self.head_dim = num_query_heads, num_key_heads, head_dim
        self.use_qk_mean, self.use_value_shift = use_qk_mean, use_value_shift
        self.rope_dim = head_dim // 4 * 2 if rope_dim is None else rope_dim
        self.rope_theta = rope_theta
        self.window = window
        self.latent_size = (num_query_heads + num_key_heads) * head_dim
        self.value_size = num_key_heads * head_dim
        self.down = nn.Linear(hidden_size, self.latent_size + self.value_size, bias=False)
        self.convs = (
            CausalConvolutions(num_query_heads + num_key_heads, head_dim, (conv_kernel_sizes[0], conv_kernel_sizes[1]))
            if use_convs
            else None
        )
        self.qk_norm = QKNorm(num_key_heads, head_dim) if use_qk_norm else None
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
        z, v = self.down(x).split([self.latent_size, self.value_size], dim=-1)
        v_current, v_delayed = v.chunk(2, dim=-1)
        z_before, v_before = self._rows_before(seq, z, v_delayed)
        starts = seq.document_starts
        ages = None if starts is None else seq.positions.to(x.device) - starts.to(x.device)
        q, k = self._queries_and_keys(z, z_before, ages, seq, rope)
        if v_before is not None:
            v = torch.cat([v_current, _delay_by_one(v_delayed, v_before, ages, seq)], dim=-1)
        # A view would keep the whole projection for backward.
        v = v.contiguous().unflatten(-1, (self.num_key_heads, self.head_dim))
        return self.output(seq.attention(q, k, v, causal=True, window=self.window).flatten(2))

    def _rows_before(self, seq: LocalSequence, z: Tensor, v_delayed: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What comes from before each chunk, in one request: rows for the convolutions, a row for the value shift."""
        num_rows = self.convs.num_rows_before if self.convs is not None else 0
        wanted = [(z, num_rows)] if num_rows else []
        wanted += [(v_delayed, 1)] if self.use_value_shift else []
        rows = seq.halo(wanted) if wanted else []
        return rows[0] if num_rows else None, rows[-1] if self.use_value_shift else None

    def _queries_and_keys(
        self, z: Tensor, z_before: Tensor | None, ages: Tensor | None, seq: LocalSequence, rope: Rope | None
    ) -> tuple[Tensor, Tensor]:
        """Latent [B, S, C] -> queries [B, S, Hq, D] and keys [B, S, Hk, D] as attention takes them."""
        latent = z.unflatten(-1, (-1, self.head_dim))
        y = latent if self.convs is None else self._convolve(self.convs, z, z_before, ages, seq)
        q, k = y.split([self.num_query_heads, self.num_key_heads], dim=2)
        if self.use_qk_mean:
            q, k = self._add_mean(q, k, latent)
        if self.qk_norm is not None:
            q, k = self.qk_norm(q, k)
        return rotate(q, rope).to(z.dtype), rotate(k, rope).to(z.dtype)

    def _convolve(
        self, convs: CausalConvolutions, z: Tensor, before: Tensor | None, ages: Tensor | None, seq: LocalSequence
    ) -> Tensor:
        if before is None:
            return convs(z, ages)
        num_rows = before.shape[2]
        if ages is not None:
            # The rows before a chunk come with zeros for other documents, so nothing has to be masked in them.
            forever = ages.new_full((ages.shape[0], len(seq.chunk_lengths), num_rows, 1), num_rows)
            ages = with_rows_before(ages.unsqueeze(-1), forever, seq.chunk_lengths).squeeze(-1)
        y = convs(with_rows_before(z, before, seq.chunk_lengths), ages)
        return drop_rows_between(y, num_rows, seq.chunk_lengths)

    def _add_mean(self, q: Tensor, k: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Add half of (own + group's other side) of the latents from before the convolutions, in fp32 or wider."""
        latent = latent.to(torch.promote_types(latent.dtype, torch.float32))
        latent_q, latent_k = latent.split([self.num_query_heads, self.num_key_heads], dim=2)
        latent_q, latent_k = latent_q.unflatten(2, (self.num_key_heads, -1)), latent_k.unsqueeze(3)
        q_mean = 0.5 * (latent_q + latent_k)
        k_mean = 0.5 * (latent_q.mean(3) + latent_k.squeeze(3))
        return q + q_mean.flatten(2, 3), k + k_mean


def _delay_by_one(rows: Tensor, before: Tensor, ages: Tensor | None, seq: LocalSequence) -> Tensor:
    """Each row becomes the one before it; a document's first row becomes zero."""
    pieces: list[Tensor] = []
    for index, chunk in enumerate(rows.split(list(seq.chunk_lengths), dim=1)):
        pieces += [before[:, index], chunk[:, :-1]]
    delayed = torch.cat(pieces, dim=1)
    return delayed if ages is None else delayed.masked_fill((ages == 0).unsqueeze(-1), 0.0)
