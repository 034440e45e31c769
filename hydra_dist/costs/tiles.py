"""Which rectangles of the score matrix a mask leaves to compute.

Attention's score matrix has a row for each query and a column for each key. Causality, a sliding window and document
boundaries make most of it zero, and what remains is cut here into rectangles ("tiles") that a fused attention kernel
can run: without a mask, with the causal flag, or, along the edge of a window, with a small explicit mask.

Queries and keys are spans: rows that lie side by side in memory and hold consecutive positions of the sequence, or
every n-th one. A rank of a context-parallel group holds one or more spans, and the keys that visit it are other spans
of the same sequence, so the two sides may lie anywhere relative to each other.

Spans with a stride of n lead to the same rectangles as consecutive ones: a query at a + n i sees a key at b + n j if
j <= i + (a - b) // n, so with (a - b) // n added to the query's index, causality is a matter of indices alone. A window
counts in strides likewise.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Literal

Kind = Literal["full", "causal", "masked"]
Rectangle = tuple[Kind, int, int, int, int]  # kind, then query and key indices as half-open ranges

# Rows of a tile along a window's edge. Smaller blocks compute less outside of the window, larger ones mean fewer calls.
SMALLEST_BLOCK, LARGEST_BLOCK = 64, 256
# Keys of the widest tile that is given one explicit mask. Wider ones are split, so that only the corner carries a mask.
WIDEST_MASK = 1024


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [row_start, row_stop) hold the global positions position, position + stride, ..."""

    row_start: int
    row_stop: int
    position: int
    stride: int = 1

    @property
    def stop(self) -> int:
        """The position after the last one."""
        return self.position + (self.row_stop - self.row_start - 1) * self.stride + 1

    def index(self, position: int) -> int:
        """How many of its rows lie before ``position``."""
        rows = -((self.position - position) // self.stride)
        return min(max(rows, 0), self.row_stop - self.row_start)


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of the score matrix in local rows, in which every query sees at least one key.

    ``full`` needs no mask. ``causal`` is square, and its query i sees its keys 0..i. In ``masked`` its query i sees the
    keys j with 0 <= offset + i - j < window. ``batch`` is one row of the batch, or None for all of them.
    """

    batch: int | None
    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    kind: Kind
    offset: int = 0
    window: int | None = None

    @property
    def pairs(self) -> int:
        """Score entries that a kernel computes for one head of one batch row; a causal tile counts as its half."""
        rows, keys = self.q_stop - self.q_start, self.k_stop - self.k_start
        return rows * (rows + 1) // 2 if self.kind == "causal" else rows * keys


def tiles(
    q_spans: Sequence[Span],
    k_spans: Sequence[Span],
    *,
    causal: bool,
    window: int | None,
    documents: Sequence[Sequence[int]] | None,
) -> tuple[Tile, ...]:
    """The tiles that cover each allowed (query, key) pair exactly once.

    Args:
        q_spans, k_spans: what the query rows and the key rows hold, in any order.
        causal: a query sees keys at its own and earlier positions only.
        window: a query sees the keys with 0 <= q_position - k_position < window (tokens; this implies causal), or None.
        documents: for each batch row, the sorted positions at which the documents of the whole sequence start, or None
            for one document. Attention never leaves a document. One entry stands for all batch rows.

    Returns:
        Tiles sorted by batch row, query row and key row. Work and count stay proportional to sequence x window where
        there is a window.

    Raises:
        ValueError: a window below 1, or spans of different strides.
    """
    if len({span.stride for span in (*q_spans, *k_spans)}) > 1:
        raise ValueError("queries and keys must be laid out with the same stride")
    if window is not None and window < 1:
        raise ValueError(f"window {window}: a query sees at least itself, so the smallest window is 1 (None for all)")
    if documents is None:
        return _sorted(_row(None, q_spans, k_spans, causal, window, ()))
    if not documents:
        return ()
    first = tuple(documents[0])
    if all(tuple(starts) == first for starts in documents[1:]):
        return _sorted(_row(None, q_spans, k_spans, causal, window, first))
    found: list[Tile] = []
    for batch, starts in enumerate(documents):
        found.extend(_row(batch, q_spans, k_spans, causal, window, starts))
    return _sorted(found)


def own_tiles(
    spans: Sequence[Span], *, causal: bool, window: int | None, documents: Sequence[Sequence[int]] | None
) -> tuple[Tile, ...]:
    """The tiles of rows over themselves: fewer than ``tiles`` makes of several spans in ascending order.

    Without a window only the order of positions matters, and that is the order of the rows, so that what lies between
    two spans can be left out.
    """
    spans = sorted(spans, key=lambda span: span.row_start)
    ascending = all(a.stop <= b.position for a, b in pairwise(spans))
    if window is not None or not ascending:
        return tiles(spans, spans, causal=causal, window=window, documents=documents)
    whole = (Span(0, spans[-1].row_stop, 0),) if spans else ()
    counted = None
    if documents is not None:
        rows = [sorted({sum(span.index(start) for span in spans) for start in starts}) for starts in documents]
        counted = [[row for row in starts if row < spans[-1].row_stop] for starts in rows]
    return tiles(whole, whole, causal=causal, window=None, documents=counted)


def executed_pairs(found: Iterable[Tile], batch_size: int = 1) -> int:
    """Score entries that kernels compute for one head over the whole batch.

    A causal tile counts as the half that is needed, and a masked tile as all of its rectangle. Multiply by
    4 x query heads x head_dim for the forward pass's FLOPs (two products of 2 FLOPs each), and by 2.5 for the
    backward's (five products).
    """
    return sum(tile.pairs * (batch_size if tile.batch is None else 1) for tile in found)


def needed_pairs(found: Iterable[Tile], batch_size: int = 1) -> int:
    """Score entries that the mask allows, for one head over the whole batch: ``executed_pairs`` less what is masked."""
    total = 0
    for tile in found:
        pairs = tile.pairs if tile.kind != "masked" else _allowed_pairs(tile)
        total += pairs * (batch_size if tile.batch is None else 1)
    return total


def _allowed_pairs(tile: Tile) -> int:
    total = 0
    for row in range(tile.q_stop - tile.q_start):
        newest = tile.offset + row  # the last key column that the query sees
        first = 0 if tile.window is None else max(0, newest - tile.window + 1)
        total += max(0, min(tile.k_stop - tile.k_start, newest + 1) - first)
    return total


def _row(
    batch: int | None,
    q_spans: Sequence[Span],
    k_spans: Sequence[Span],
    causal: bool,
    window: int | None,
    starts: Sequence[int],
) -> list[Tile]:
    """The tiles of one batch row, document by document."""
    found: list[Tile] = []
    for q in q_spans:
        for k in k_spans:
            if q.row_start >= q.row_stop or k.row_start >= k.row_stop:
                continue
            found.extend(_of_two_spans(batch, q, k, causal or window is not None, window, starts))
    return _joined(found)


def _of_two_spans(
    batch: int | None, q: Span, k: Span, causal: bool, window: int | None, starts: Sequence[int]
) -> Iterator[Tile]:
    # The indices of queries are shifted, so that a query sees keys up to its own index.
    shift, past = divmod(q.position - k.position, q.stride)
    if window is not None:
        window = -((past - window) // q.stride)  # of those indices: ceil((window - past) / stride)
    for low, high in _documents_of_both(q, k, starts):
        rows = (q.index(low) + shift, q.index(high) + shift, k.index(low), k.index(high))
        for kind, q_a, q_b, k_a, k_b in _band(*rows, causal, window):
            q_rows = (q_a - shift + q.row_start, q_b - shift + q.row_start)
            masked = (q_a - k_a, window) if kind == "masked" else (0, None)
            yield Tile(batch, *q_rows, k_a + k.row_start, k_b + k.row_start, kind, *masked)


def _documents_of_both(q: Span, k: Span, starts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The position ranges of the documents that both spans have rows of."""
    everything = max(q.stop, k.stop)
    lowest = min(q.position, k.position)
    first = max(bisect_right(starts, q.position), bisect_right(starts, k.position)) - 1
    last = min(bisect_right(starts, q.stop - 1), bisect_right(starts, k.stop - 1)) - 1
    for index in range(first, last + 1):
        low = starts[index] if index >= 0 else lowest
        high = starts[index + 1] if index + 1 < len(starts) else everything
        yield low, high


def _band(q_a: int, q_b: int, k_a: int, k_b: int, causal: bool, window: int | None) -> Iterator[Rectangle]:
    """Cut the pairs of queries [q_a, q_b) and keys [k_a, k_b) that causality and the window allow into rectangles."""
    if window is not None and window < 1:  # striped keys, all of them further away than the window reaches
        return
    if causal:
        q_a, k_b = max(q_a, k_a), min(k_b, q_b)
    if window is not None:
        k_a, q_b = max(k_a, q_a - window + 1), min(q_b, k_b + window - 1)
    if q_a >= q_b or k_a >= k_b:
        return
    if window is not None and q_b - 1 - k_a >= window:
        yield from _window_edge(q_a, q_b, k_a, k_b, window)
    elif causal and k_b - 1 > q_a:
        if k_a < q_a:
            yield "full", q_a, k_b, k_a, q_a
        yield "causal", q_a, k_b, q_a, k_b
        if k_b < q_b:
            yield "full", k_b, q_b, k_a, k_b
    else:
        yield "full", q_a, q_b, k_a, k_b


def _window_edge(q_a: int, q_b: int, k_a: int, k_b: int, window: int) -> Iterator[Rectangle]:
    """The same where the window's far edge runs through the rectangle."""
    block = SMALLEST_BLOCK
    while block < min(window, LARGEST_BLOCK):
        block *= 2
    if q_b - q_a > block:
        # The first queries of a document see all of its keys so far. They need no mask, so they go as one.
        start = k_a + window if q_a < k_a + window and window >= block else q_a
        if start > q_a:
            yield from _band(q_a, start, k_a, k_b, True, window)
        for row in range(start, q_b, block):
            yield from _band(row, min(row + block, q_b), k_a, k_b, True, window)
    elif k_b - k_a <= WIDEST_MASK:
        yield "masked", q_a, q_b, k_a, k_b
    else:
        # Keys before q_b - window are lost to some of the queries: a corner of at most block x block. The others are
        # within the window of all of them.
        yield from _band(q_a, q_b, k_a, q_b - window, True, window)
        yield from _band(q_a, q_b, max(k_a, q_b - window), k_b, True, window)


def _joined(found: list[Tile]) -> list[Tile]:
    """Join full tiles that lie side by side: first those over the same keys, then those over the same queries."""
    rest = [tile for tile in found if tile.kind != "full"]
    full = [tile for tile in found if tile.kind == "full"]
    if len(full) < 2:
        return found
    full.sort(key=lambda tile: (tile.k_start, tile.k_stop, tile.q_start))
    full = [
        Tile(part.batch, q_start, q_stop, part.k_start, part.k_stop, "full")
        for _, group in groupby(full, key=lambda tile: (tile.k_start, tile.k_stop))
        for q_start, q_stop, part in _runs([(tile.q_start, tile.q_stop, tile) for tile in group])
    ]
    full.sort(key=lambda tile: (tile.q_start, tile.q_stop, tile.k_start))
    full = [
        Tile(part.batch, part.q_start, part.q_stop, k_start, k_stop, "full")
        for _, group in groupby(full, key=lambda tile: (tile.q_start, tile.q_stop))
        for k_start, k_stop, part in _runs([(tile.k_start, tile.k_stop, tile) for tile in group])
    ]
    return rest + full


def _runs(ranges: list[tuple[int, int, Tile]]) -> Iterator[tuple[int, int, Tile]]:
    """Join sorted ranges where one stops as the next starts; the tile is that of the first."""
    start, stop, tile = ranges[0]
    for next_start, next_stop, next_tile in ranges[1:]:
        if next_start == stop:
            stop = next_stop
        else:
            yield start, stop, tile
            start, stop, tile = next_start, next_stop, next_tile
    yield start, stop, tile


def _sorted(found: list[Tile]) -> tuple[Tile, ...]:
    return tuple(sorted(found, key=lambda tile: (tile.batch or 0, tile.q_start, tile.k_start)))
