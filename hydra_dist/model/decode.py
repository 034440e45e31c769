"""Token-by-token decoding: what a layer keeps of the tokens that it has seen.

To a layer, new tokens are a chunk of a sequence whose earlier rows are elsewhere: here in a cache instead of on other
ranks. So the cache answers the same two questions as a context-parallel plan: the rows before the chunk (the state of
the convolutions and of the value shift) and attention over everything before (keys and values). The layers do not know
the difference, and prefill, a chunk of a prompt, and a single token are one code path.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hydra_dist.attention import Mask, attention
from hydra_dist.model.transformer import Transformer


class LayerCache:
    """Keys, values and last rows of one layer; given to the layer as its ``seq``.

    With a sliding window only the rows that a later token can still see are kept.
    """

    document_starts = None
    ages = None
    halo_handle = None

    def __init__(self) -> None:
        self.positions = torch.empty(0, dtype=torch.long)
        self.chunk_lengths: tuple[int, ...] = ()
        self._rows: list[Tensor] = []
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._start = self._stop = 0  # rows of the buffers that hold something
        self._first_position = 0  # of row _start

    def expect(self, positions: Tensor) -> None:
        """The next call of the layer is for these consecutive positions."""
        self.positions = positions
        self.chunk_lengths = (positions.shape[0],)

    def halo(self, parts: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
        """The last rows of each tensor that came before, zeros before the first; keeps the last of the new ones."""
        if not self._rows:
            self._rows = [tensor.new_zeros(tensor.shape[0], rows, tensor.shape[-1]) for tensor, rows in parts]
        before = self._rows
        self._rows = [
            torch.cat([old, tensor], dim=1)[:, -rows:].clone()
            for old, (tensor, rows) in zip(before, parts, strict=True)
        ]
        return [old.unsqueeze(1) for old in before]

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = True,
        window: int | None = None,
        logit_bound: float | None = None,
    ) -> Tensor:
        """Attention of the new rows over all that the cache holds and themselves."""
        keys, values = self._append(k, v)
        first, length = self._first_position, self._stop - self._start
        mask = Mask(
            causal=causal,
            window=window,
            q_positions=self.positions,
            k_positions=torch.arange(first, first + length, device=q.device),
        )
        out, _ = attention(q, keys, values, mask=mask)
        if window is not None and length > window - 1:
            surplus = length - (window - 1)
            self._start += surplus
            self._first_position += surplus
        return out

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add rows behind the held ones; a full buffer is replaced by one of twice the held rows."""
        held, new = self._stop - self._start, k.shape[1]
        if self._keys is None or self._values is None or self._stop + new > self._keys.shape[1]:
            capacity = max(64, 2 * (held + new))
            buffers = [x.new_empty(x.shape[0], capacity, *x.shape[2:]) for x in (k, v)]
            for buffer, old in zip(buffers, (self._keys, self._values), strict=True):
                if old is not None:
                    buffer[:, :held] = old[:, self._start : self._stop]
            self._keys, self._values = buffers
            self._start, self._stop = 0, held
        self._keys[:, self._stop : self._stop + new] = k
        self._values[:, self._stop : self._stop + new] = v
        self._stop += new
        return self._keys[:, self._start : self._stop], self._values[:, self._start : self._stop]


class DecodeState:
    """Everything that is kept between two calls of ``decode``; ``length`` tokens have been seen."""

    def __init__(self, model: Transformer) -> None:
        self.layers = [LayerCache() for _ in model.layers]
        self.length = 0


@torch.no_grad()
def decode(model: Transformer, tokens: Tensor, state: DecodeState) -> Tensor:
    """Logits [B, S, V] of the next ``tokens`` [B, S] after the ``state.length`` that came before; moves ``state`` on.

    Equal to the last S rows of the model's forward over all tokens so far, but for rounding.
    """
    return model.head(decode_hidden(model, tokens, state))


@torch.no_grad()
def decode_hidden(model: Transformer, tokens: Tensor, state: DecodeState) -> Tensor:
    """``decode`` without the head: the normalised last hidden rows [B, S, E]."""
    positions = torch.arange(state.length, state.length + tokens.shape[1], device=tokens.device)
    x = model.embedding(tokens)
    rope = model.rope(positions, x.dtype)
    for layer, cache in zip(model.layers, state.layers, strict=True):
        cache.expect(positions)
        x = layer(x, cache, rope)
    state.length += tokens.shape[1]
    return model.norm(x)
