"""Which rows of one rank another one has business with, under a mask.

Attention pairs queries with keys. What a rank must be sent of another one's keys are those that one of its queries
sees, and what must be sent of queries are those that see one of its keys. Documents are runs of positions and a window
is a distance, so it is enough to look at the row of the other side that comes nearest.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from hydra_dist.costs.layout import Chunk, Dealing, Documents, offsets

Side = Literal["keys", "queries"]
Rows = tuple[range, ...]
"""Local rows of a rank: ascending ranges that do not touch."""
_FAR = 1 << 62


@dataclass(frozen=True)
class MaskRule:
    """Which pairs (query, key) a mask allows.

    Attributes:
        causal: a query sees keys at its own and earlier positions only.
        window: a query sees the keys with 0 <= q_position - k_position < window (tokens; this implies causal), or None.
        documents: for each batch row the sorted start positions of its documents, or None for one document. Rows are
            wanted where any batch row wants them.
    """

    causal: bool
    window: int | None = None
    documents: Documents | None = None

    @property
    def reach(self) -> int:
        """A query and a key are less than this apart."""
        return _FAR if self.window is None else self.window

    def first_of(self, position: int) -> int:
        """Where the document of ``position`` begins, in the batch row in which it begins first."""
        if self.documents is None:
            return 0
        return min(starts[bisect_right(starts, position) - 1] for starts in self.documents)

    def stop_of(self, position: int) -> int:
        """Where the document of ``position`` ends, in the batch row in which it ends last."""
        if self.documents is None:
            return _FAR
        places = ((starts, bisect_right(starts, position)) for starts in self.documents)
        return max(starts[index] if index < len(starts) else _FAR for starts, index in places)


def wanted_rows(dealing: Dealing, owner: int, reader: int, side: Side, mask: MaskRule) -> Rows:
    """The local rows of ``owner``, as keys or as queries, that pair with some row of ``reader``.

    Exact for consecutive positions. Where rows are striped it is all of them or none.
    """
    later = side == "keys" or not (mask.causal or mask.window is not None)  # a row may pair with a later one
    earlier = side == "queries" or not (mask.causal or mask.window is not None)
    found: list[range] = []
    held = dealing[owner]
    for mine, offset in zip(held, offsets(held), strict=True):
        for other in dealing[reader]:
            for part in _facing(mine, other, mask, earlier, later):
                found.append(range(offset + mine.index(part.start), offset + mine.index(part[-1]) + 1))
    return united(found)


def united(ranges: Iterable[range]) -> Rows:
    """Ascending ranges that do not touch, with all rows of ``ranges``."""
    result: list[range] = []
    for part in sorted((part for part in ranges if len(part)), key=lambda part: part.start):
        if result and part.start <= result[-1].stop:
            result[-1] = range(result[-1].start, max(part.stop, result[-1].stop))
        else:
            result.append(part)
    return tuple(result)


def number_of(rows: Rows) -> int:
    return sum(map(len, rows))


def _facing(mine: Chunk, other: Chunk, mask: MaskRule, earlier: bool, later: bool) -> list[Chunk]:
    """The positions of ``mine`` that pair with one of ``other``, which they may be ``earlier`` or ``later`` than it."""
    if mine.step > 1:
        gaps = [(mine.start, (other.start - mine.start) % mine.step)] if later else []
        gaps += [(other.start, (mine.start - other.start) % mine.step)] if earlier else []
        stop = max(mine[-1], other[-1]) + 1
        return [mine] if any(_meet(start, mine.step, gap, stop, mask) for start, gap in gaps) else []
    if other.start >= mine.stop:
        if later:
            nearest = other.start
            low = max(mine.start, mask.first_of(nearest), nearest - mask.reach + 1)
            return [range(low, mine.stop)] if low < mine.stop else []
    elif earlier:
        nearest = other.stop - 1
        high = min(mine.stop, mask.stop_of(nearest), nearest + mask.reach)
        return [range(mine.start, high)] if mine.start < high else []
    return []


def _meet(start: int, step: int, gap: int, stop: int, mask: MaskRule) -> bool:
    """Whether some position start + i step and the one ``gap`` after it lie in one document and before ``stop``."""
    if gap >= mask.reach:
        return False
    all_starts: Sequence[Sequence[int]] = [[0]] if mask.documents is None else mask.documents
    for starts in all_starts:
        for low, high in pairwise([*starts, _FAR]):
            first = low + (start - low) % step
            if first + gap < min(high, stop):
                return True
    return False
