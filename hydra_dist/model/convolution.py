"""The two causal convolutions of CCGQA over the latent queries and keys, and the rows that they read.

The first acts on each channel by itself (depthwise, k0 taps), the second mixes the channels of one head (k1 taps);
there is no activation between them, and both have a bias. Only the latent z is padded: before a sequence or a document
z is zero, so the first convolution's output there is its bias, not zero.

Source: Figliolia et al. 2025 (arXiv 2510.04476), section III and listing A.1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def with_rows_before(rows: Tensor, before: Tensor, chunk_lengths: Sequence[int]) -> Tensor:
    """Put each chunk behind the rows that come before it: [B, S, C], [B, chunks, h, C] -> [B, S + chunks h, C]."""
    pieces: list[Tensor] = []
    for index, chunk in enumerate(rows.split(list(chunk_lengths), dim=1)):
        pieces += [before[:, index], chunk]
    return torch.cat(pieces, dim=1)


def drop_rows_between(rows: Tensor, num_before: int, chunk_lengths: Sequence[int]) -> Tensor:
    """Undo ``with_rows_before`` behind convolutions that took ``num_before`` rows off the front of the whole."""
    if len(chunk_lengths) == 1:
        return rows
    pieces, start = [], 0
    for length in chunk_lengths:
        pieces.append(rows[:, start : start + length])
        start += length + num_before
    return torch.cat(pieces, dim=1)


class CausalConvolutions(nn.Module):
    """Depthwise, then head-grouped: [B, T, heads x D] -> [B, T - (k0 - 1) - (k1 - 1), heads, D].

    Parameters: depthwise_weight [C, k0] and grouped_weight [heads, k1 x D in, D out], the last tap that of the current
    row; depthwise_bias [C] and grouped_bias [heads, D]. (torch's Conv1d keeps the second as [C, D in, k1].)
    """

    def __init__(self, num_heads: int, head_dim: int, kernel_sizes: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.kernel_sizes = kernel_sizes
        self.num_rows_before = sum(kernel_sizes) - 2
        channels = num_heads * head_dim
        self.depthwise_weight = nn.Parameter(torch.zeros(channels, kernel_sizes[0]))
        self.depthwise_bias = nn.Parameter(torch.zeros(channels))
        self.grouped_weight = nn.Parameter(torch.zeros(num_heads, kernel_sizes[1] * head_dim, head_dim))
        self.grouped_bias = nn.Parameter(torch.zeros(num_heads, head_dim))

    def forward(self, z: Tensor, ages: Tensor | None = None) -> Tensor:
        """Convolve ``z``, which begins with the rows before its first one.

        Args:
            z: [B, T, C].
            ages: [B, T], how many rows of its document stand before each row of z, or None where no document begins
                inside z. A tap that reaches further back than its row's age reads zero (first convolution) or the
                first convolution's bias (second).
        """
        return self._grouped(self._depthwise(z, ages), self.depthwise_bias.to(z.dtype), ages)

    def _depthwise(self, z: Tensor, ages: Tensor | None) -> Tensor:
        """Summed in fp32 or wider and rounded once to z's dtype; backward keeps z as it is, no wider copy."""
        size = self.kernel_sizes[0]
        length = z.shape[1] - (size - 1)
        wide = torch.promote_types(z.dtype, torch.float32)
        # Autocast on a GPU would widen z itself, and backward would keep that.
        with torch.autocast(z.device.type, enabled=False):
            weight, u = self.depthwise_weight.to(wide), self.depthwise_bias.to(wide)
            for delay in range(size):
                start = size - 1 - delay
                tap, factor = z[:, start : start + length], weight[:, start]
                if ages is None or delay == 0:
                    u = torch.addcmul(u, tap, factor)
                else:
                    u = u + (tap * factor).masked_fill(~_reaches(ages[:, -length:], delay), 0.0)
            return u.to(z.dtype)

    def _grouped(self, u: Tensor, bias: Tensor, ages: Tensor | None) -> Tensor:
        size = self.kernel_sizes[1]
        length = u.shape[1] - (size - 1)
        taps = []
        for start in range(size):
            tap = u[:, start : start + length]
            delay = size - 1 - start
            if ages is not None and delay > 0:
                tap = torch.where(_reaches(ages[:, -length:], delay), tap, bias)
            taps.append(tap.unflatten(-1, (self.num_heads, self.head_dim)))
        # One matrix product a head, with all taps along the summed dimension: [heads, B T, k1 D] x [heads, k1 D, D].
        columns = taps[0] if size == 1 else torch.cat(taps, dim=-1)
        columns = columns.flatten(0, 1).transpose(0, 1)
        y = torch.baddbmm(self.grouped_bias.to(u.dtype).unsqueeze(1), columns, self.grouped_weight.to(u.dtype))
        return y.transpose(0, 1).unflatten(0, (u.shape[0], length))


def _reaches(ages: Tensor, delay: int) -> Tensor:
    """[B, T] -> [B, T, 1]: does a tap that reads ``delay`` rows back stay inside its row's document?"""
    return (ages >= delay).unsqueeze(-1)
