"""Who holds which rows of a sequence that is spread over ranks.

A layout deals the positions of one sequence to the ranks of a context-parallel group. Lengths need not divide: pieces
then differ by a row.

``contiguous``  one piece a rank. Under a causal mask the last rank has most of the work.
``zigzag``      two pieces a rank, an early one with a late one: equal work under a causal mask.
``striped``     every P-th row: equal work too, and for a convolution a neighbour on another rank at every row.
``balanced``    as many pieces as it takes for equal work under a causal mask within the documents of a packed batch.

A *chunk* is a ``range`` of positions. A rank's rows are its chunks one after another, and a *dealing* is the chunks of
all ranks.

Source: Liu et al. 2023 (arXiv 2310.01889) for contiguous; Brandon et al. 2023 (arXiv 2311.09431) for striped.
"""

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from hydra_dist.errors import ConfigError, nearest

Chunk = range
Dealing = list[list[Chunk]]
"""The chunks of every rank."""
Documents = Sequence[Sequence[int]]
"""For each batch row the sorted positions at which its documents start."""
LAYOUTS = ("zigzag", "contiguous", "striped", "balanced")

BALANCE_WANTED = 1.05
"""The most work of a rank over the mean that ``balanced`` is content with; it cuts finer while there is more."""
SMALLEST_BALANCED_PIECE = 128
"""Rows. Finer pieces make more tiles of attention and more halo than they save."""


def chunks(layout: str, sequence_length: int, num_ranks: int, documents: Documents | None = None) -> Dealing:
    """The chunks of every rank, in ascending order.

    Args:
        layout: ``contiguous`` (rank r holds the r-th of P pieces; the i-th of n pieces is [i S // n, (i + 1) S // n)),
            ``zigzag`` (of 2P pieces, rank r holds the pieces r and 2P - 1 - r), ``striped`` (rank r holds the rows
            r, r + P, ...) or ``balanced``. Pieces of one rank that touch are one chunk, so that one rank has one chunk
            in any layout.
        sequence_length: rows of the whole sequence, S.
        num_ranks: P.
        documents: what ``balanced`` looks at; None: one document, for which it is ``zigzag``.

    Raises:
        ConfigError: an unknown layout, or a sequence with fewer rows than pieces.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"context.layout: {layout}{nearest(layout, LAYOUTS)}; {_listed(LAYOUTS)} exist")
    if num_ranks < 1:
        raise ConfigError(f"context.size {num_ranks}: a sequence needs at least 1 rank; 1 works")
    num_pieces = smallest_sequence(layout, num_ranks)
    if sequence_length < num_pieces:
        raise ConfigError(_too_short(layout, sequence_length, num_ranks, num_pieces))
    if num_ranks == 1:
        return [[range(sequence_length)]]
    if layout == "striped":
        return [[range(rank, sequence_length, num_ranks)] for rank in range(num_ranks)]
    if layout == "balanced" and documents is not None:
        return _balanced(sequence_length, num_ranks, documents)
    pieces = _pieces(sequence_length, num_pieces)
    if num_pieces == num_ranks:
        return [[piece] for piece in pieces]
    return [_joined([pieces[rank], pieces[num_pieces - 1 - rank]]) for rank in range(num_ranks)]


def smallest_sequence(layout: str, num_ranks: int) -> int:
    """Rows that a sequence has to have."""
    return 2 * num_ranks if layout in ("zigzag", "balanced") and num_ranks > 1 else num_ranks


def lengths(dealing: Dealing) -> list[int]:
    """Rows that each rank holds."""
    return [sum(map(len, held)) for held in dealing]


def cut(held: Sequence[Chunk], num_parts: int) -> Dealing:
    """The rows of one rank, dealt on to ``num_parts`` in order, so that each has one run of them."""
    total = sum(map(len, held))
    edges = [part * total // num_parts for part in range(num_parts + 1)]
    return [_rows_of(held, start, stop) for start, stop in pairwise(edges)]


def offsets(held: Sequence[Chunk]) -> list[int]:
    """The local row at which each chunk begins."""
    found, row = [], 0
    for chunk in held:
        found.append(row)
        row += len(chunk)
    return found


def check_dealing(dealing: Dealing, sequence_length: int) -> None:
    """Raise ValueError where some position has no owner or two, or a rank holds nothing."""
    owned = sorted(position for held in dealing for chunk in held for position in chunk)
    if owned != list(range(sequence_length)):
        raise ValueError(f"a dealing must give each of the positions 0..{sequence_length - 1} to one rank")
    for rank, held in enumerate(dealing):
        if not held or not all(len(chunk) for chunk in held):
            raise ValueError(
                f"a dealing must give rows to every rank, in chunks that have some; rank {rank} has {held}"
            )
        if any(chunk.step != 1 for chunk in held) or any(a.stop > b.start for a, b in pairwise(held)):
            raise ValueError(
                f"a dealing must give each rank ascending ranges with a stride of 1; rank {rank} has {held}"
            )


def causal_pairs(dealing: Dealing, documents: Documents) -> list[int]:
    """Pairs (query, key) of each rank under a causal mask within documents, over all batch rows; strides of 1 only."""
    work = _Work(documents)
    return [sum(work.between(chunk.start, chunk.stop) for chunk in held) for held in dealing]


class _Work:
    """Pairs (query, key) that causal attention within documents computes, summed over batch rows."""

    def __init__(self, documents: Documents) -> None:
        self._starts = [list(starts) if starts and starts[0] == 0 else [0, *starts] for starts in documents]
        self._before = []
        for starts in self._starts:
            sums = [0]
            for start, stop in pairwise(starts):
                sums.append(sums[-1] + (stop - start) * (stop - start + 1) // 2)
            self._before.append(sums)

    def between(self, start: int, stop: int) -> int:
        return self._until(stop) - self._until(start)

    def _until(self, position: int) -> int:
        total = 0
        for starts, before in zip(self._starts, self._before, strict=True):
            index = bisect_right(starts, position) - 1
            rows = position - starts[index]
            total += before[index] + rows * (rows + 1) // 2
        return total


def _balanced(sequence_length: int, num_ranks: int, documents: Documents) -> Dealing:
    """Cut into 2P pieces, 4P, 8P, ... and deal the same number to each rank, until work is even or pieces get small."""
    work = _Work(documents)
    best: Dealing = []
    least = float("inf")
    per_rank = 2
    while not best or sequence_length >= per_rank * num_ranks * SMALLEST_BALANCED_PIECE:
        pieces = _pieces(sequence_length, per_rank * num_ranks)
        loads = [work.between(piece.start, piece.stop) for piece in pieces]
        dealt = _deal_evenly(loads, num_ranks, per_rank)
        most = max(sum(loads[index] for index in own) for own in dealt) * num_ranks / sum(loads)
        if most < least:
            least, best = most, [_joined([pieces[index] for index in sorted(own)]) for own in dealt]
        if least <= BALANCE_WANTED:
            break
        per_rank *= 2
    return best


def _deal_evenly(loads: Sequence[int], num_ranks: int, per_rank: int) -> list[list[int]]:
    """The heaviest first, each to the rank with the least so far that has room; ties go to the lower rank."""
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    ranks = [(0, rank) for rank in range(num_ranks)]
    for index in sorted(range(len(loads)), key=lambda index: (-loads[index], index)):
        load, rank = heapq.heappop(ranks)
        dealt[rank].append(index)
        if len(dealt[rank]) < per_rank:
            heapq.heappush(ranks, (load + loads[index], rank))
    return dealt


def _pieces(sequence_length: int, number: int) -> list[Chunk]:
    edges = [i * sequence_length // number for i in range(number + 1)]
    return [range(start, stop) for start, stop in pairwise(edges)]


def _joined(pieces: list[Chunk]) -> list[Chunk]:
    """Ascending pieces with those that touch made one."""
    joined: list[Chunk] = []
    for piece in pieces:
        if joined and joined[-1].stop == piece.start:
            joined[-1] = range(joined[-1].start, piece.stop)
        else:
            joined.append(piece)
    return joined


def _rows_of(held: Sequence[Chunk], start: int, stop: int) -> list[Chunk]:
    """The chunks of the local rows [start, stop)."""
    parts = (
        chunk[max(0, start - offset) : max(0, stop - offset)] for chunk, offset in zip(held, offsets(held), strict=True)
    )
    return [part for part in parts if len(part)]


def _too_short(layout: str, sequence_length: int, num_ranks: int, num_pieces: int) -> str:
    fitting = sequence_length * num_ranks // num_pieces
    works = [f"a sequence of {num_pieces} or more"]
    if fitting >= 1:
        works.append(f"context.size {fitting}")
    elif sequence_length >= 1:
        works.append("context.size 1")
    return (
        f"context.layout {layout} over context.size {num_ranks} cuts a sequence into {num_pieces} pieces, and a "
        f"sequence of {sequence_length} has fewer rows; {' or '.join(works)} works"
    )


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
