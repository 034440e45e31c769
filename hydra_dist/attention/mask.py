"""Which keys a query may see: causality, a sliding window, documents, and where the rows lie in the sequence."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hydra_dist.costs import tiles as tiling
from hydra_dist.costs.tiles import Span, Tile

_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.uint8, torch.int8)


@dataclass(frozen=True, eq=False)
class Mask:
    """Which pairs of queries and keys attention computes. All conditions that are given hold together.

    Attributes:
        causal: a key is seen where k_position <= q_position.
        window: a key is seen where 0 <= q_position - k_position < window (tokens; this implies causal). None: no limit.
        document_starts: [B, Sq] integers (B may be 1 for all batch rows): the position of the first row of the document
            that each query belongs to. A key is seen where its document is the same.
        k_document_starts: [B, Sk], the same of the keys. None: the keys are the queries' own rows.
        q_positions: [Sq] integers, the global position of each query. None: 0..Sq-1.
        k_positions: [Sk], the same of the keys. None: 0..Sk-1.

    Raises:
        ValueError: a window below 1, tensors of the wrong shape or dtype, k_document_starts without document_starts.
    """

    causal: bool = True
    window: int | None = None
    document_starts: Tensor | None = None
    k_document_starts: Tensor | None = None
    q_positions: Tensor | None = None
    k_positions: Tensor | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"Mask(window={self.window}): a query sees at least itself, so the smallest window is 1 (None for all)"
            )
        for name, dims in (("document_starts", 2), ("k_document_starts", 2), ("q_positions", 1), ("k_positions", 1)):
            value = getattr(self, name)
            if value is None:
                continue
            if value.dim() != dims or value.dtype not in _INTEGERS:
                shape = "[batch, sequence]" if dims == 2 else "[sequence]"
                raise ValueError(
                    f"Mask({name}=...): a {value.dtype} tensor of shape {list(value.shape)}, where integers of shape "
                    f"{shape} are needed"
                )
        if self.k_document_starts is not None and self.document_starts is None:
            raise ValueError("Mask(k_document_starts=...) needs document_starts for the queries as well")

    def check(self, batch_size: int, q_length: int, k_length: int) -> None:
        """Raise ValueError where the mask does not fit ``batch_size`` rows of so many queries and keys."""
        expected = (
            ("document_starts", q_length),
            ("k_document_starts", k_length),
            ("q_positions", q_length),
            ("k_positions", k_length),
        )
        for name, length in expected:
            value = getattr(self, name)
            if value is None:
                continue
            if value.shape[-1] != length or (value.dim() == 2 and value.shape[0] not in (1, batch_size)):
                raise ValueError(
                    f"Mask({name}=...) has shape {list(value.shape)}, but attention runs over {batch_size} batch rows "
                    f"of {q_length} queries and {k_length} keys"
                )
        if self.document_starts is not None and self.k_document_starts is None and q_length != k_length:
            raise ValueError(
                f"Mask(document_starts=...) over {q_length} queries and {k_length} keys: the keys are not the queries' "
                "own rows, so k_document_starts is needed as well"
            )

    def allowed(self, q_length: int, k_length: int, device: torch.device | str = "cpu") -> Tensor:
        """The whole mask, bool [B or 1, Sq, Sk]: the definition, one condition after the other."""
        q_position = _positions(self.q_positions, q_length, device).unsqueeze(-1)  # [Sq, 1]
        k_position = _positions(self.k_positions, k_length, device)  # [Sk]
        distance = q_position - k_position
        allowed = torch.ones(1, q_length, k_length, dtype=torch.bool, device=device)
        if self.causal:
            allowed = allowed & (distance >= 0)
        if self.window is not None:
            allowed = allowed & (distance >= 0) & (distance < self.window)
        if self.document_starts is not None:
            k_starts = self.document_starts if self.k_document_starts is None else self.k_document_starts
            allowed = allowed & (self.document_starts.to(device).unsqueeze(2) == k_starts.to(device).unsqueeze(1))
        return allowed

    def spans(self, q_length: int, k_length: int) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
        """The runs of consecutive positions that the queries and the keys are made of."""
        return _runs(self.q_positions, q_length), _runs(self.k_positions, k_length)

    def tiles(self, q_length: int, k_length: int) -> tuple[Tile, ...]:
        """The rectangles of the score matrix that are left to compute: see ``hydra_dist.costs.tiles``.

        Raises:
            ValueError: document starts that contradict the positions, such as local starts with global positions.
        """
        q_spans, k_spans = self.spans(q_length, k_length)
        return _cached_tiles(q_spans, k_spans, self.causal, self.window, self.document_positions(q_length, k_length))

    def document_positions(self, q_length: int, k_length: int) -> tuple[tuple[int, ...], ...] | None:
        """For each batch row, the sorted starts of the documents that queries or keys belong to; None: one document.

        Raises:
            ValueError: document starts that contradict the positions.
        """
        starts = self.document_starts
        others = (self.k_document_starts, self.q_positions, self.k_positions)
        if starts is None or not _is_dear(starts) or starts.is_inference() or any(x is not None for x in others):
            return self._find_documents(q_length, k_length)
        version, found = _documents_of.get(starts, (None, None))
        if version != starts._version:
            found = self._find_documents(q_length, k_length)
            _documents_of[starts] = starts._version, found
        return found

    def _find_documents(self, q_length: int, k_length: int) -> tuple[tuple[int, ...], ...] | None:
        if self.document_starts is None:
            return None
        q_starts = self.document_starts.cpu().long()
        k_starts = q_starts if self.k_document_starts is None else self.k_document_starts.cpu().long()
        q_positions, k_positions = _positions(self.q_positions, q_length), _positions(self.k_positions, k_length)
        batch_size = max(q_starts.shape[0], k_starts.shape[0])
        rows = []
        for q_row, k_row in zip(q_starts.expand(batch_size, -1), k_starts.expand(batch_size, -1), strict=True):
            starts = torch.unique(torch.cat([q_row, k_row]))
            _check_starts("document_starts", q_row, q_positions, starts)
            _check_starts("k_document_starts", k_row, k_positions, starts)
            rows.append(tuple(starts.tolist()))
        return tuple(rows)


# Each layer, forward and backward, asks for the documents of the same batch, and looking waits for the device.
# A tensor's version counts its changes in place.
_documents_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _is_dear(x: Tensor) -> bool:
    """Whether reading its numbers waits for a device."""
    return x.is_cuda


@lru_cache(maxsize=64)
def _cached_tiles(
    q_spans: tuple[Span, ...],
    k_spans: tuple[Span, ...],
    causal: bool,
    window: int | None,
    documents: tuple[tuple[int, ...], ...] | None,
) -> tuple[Tile, ...]:
    """Each layer, forward and backward, asks for the tiles of the same batch."""
    return tiling.tiles(q_spans, k_spans, causal=causal, window=window, documents=documents)


def _positions(positions: Tensor | None, length: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.arange(length, device=device) if positions is None else positions.to(device).long()


def _runs(positions: Tensor | None, length: int) -> tuple[Span, ...]:
    if length == 0:
        return ()
    if positions is None:
        return (Span(0, length, 0),)
    positions = positions.cpu().long()
    breaks = (torch.nonzero(positions.diff() != 1).flatten() + 1).tolist()
    edges: Sequence[int] = [0, *breaks, length]
    firsts = positions[edges[:-1]].tolist()
    return tuple(Span(a, b, first) for a, b, first in zip(edges[:-1], edges[1:], firsts, strict=True))


def _check_starts(name: str, row: Tensor, positions: Tensor, starts: Tensor) -> None:
    """A row at position p belongs to the document with the last start that is not after p."""
    index = torch.searchsorted(starts, positions, right=True) - 1
    wrong = (index < 0) | (starts[index.clamp(min=0)] != row)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"Mask({name}=...): the row at position {int(positions[at])} says that its document starts at "
            f"{int(row[at])}; a document starts at or before its rows and ends where the next one starts (both are "
            "global positions)"
        )
