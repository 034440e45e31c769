"""Rows that go around a ring of ranks: how far they travel, and what that moves.

Rows of a rank (its keys and values, or its queries with what belongs to them) visit the other ranks one after another,
as far as the last one that has business with them. Sums that belong to them (gradients) follow one hop behind, from the
first rank that adds something, and the last one sends them home.
"""

from dataclasses import dataclass
from typing import Literal

from hydra_dist.costs.layout import Dealing
from hydra_dist.costs.needs import MaskRule, Rows, Side, number_of, united, wanted_rows
from hydra_dist.costs.traffic import RankTraffic, accumulator_bytes
from hydra_dist.errors import ConfigError


@dataclass(frozen=True)
class RingPath:
    """In which order the rows of a rank visit the others.

    Attributes:
        num_ranks: P.
        inner: ranks of one node, where a ring of rings is wanted: rows visit all ranks of a node, then go to the next
            node, all ranks of a node at once over as many wires. None: one ring.
        reverse: the other way round.
    """

    num_ranks: int
    inner: int | None = None
    reverse: bool = False

    def __post_init__(self) -> None:
        if self.inner is not None and (self.inner < 1 or self.num_ranks % self.inner):
            works = [size for size in range(1, self.num_ranks + 1) if self.num_ranks % size == 0]
            raise ConfigError(
                f"context.inner_ring {self.inner} does not divide the {self.num_ranks} ranks of the ring; "
                f"{' or '.join(map(str, works))} works"
            )

    def visited(self, owner: int, hop: int) -> int:
        """The rank at which ``owner``'s rows are at a hop; 0 is at home."""
        return self._moved(owner, hop, 1)

    def owner(self, rank: int, hop: int) -> int:
        """Whose rows are at ``rank`` at a hop."""
        return self._moved(rank, hop, -1)

    def _moved(self, rank: int, hop: int, way: int) -> int:
        inner = self.num_ranks if self.inner is None else self.inner
        outer = self.num_ranks // inner
        last = self.num_ranks - 1
        node, place = divmod(last - rank if self.reverse else rank, inner)
        rounds, steps = divmod(hop, inner)
        node = (node + way * rounds) % outer
        place = (place + way * (rounds * (inner - 1) + steps)) % inner
        moved = node * inner + place
        return last - moved if self.reverse else moved


@dataclass(frozen=True, slots=True)
class Journey:
    """The way of one rank's rows: which of them leave home, and the first and last hop at which some are wanted.

    Ranks in between that want none pass them on. (), 0 and 0 where no rank wants any.
    """

    rows: Rows
    first: int
    last: int

    @property
    def num_rows(self) -> int:
        return number_of(self.rows)


def journeys(dealing: Dealing, mask: MaskRule, path: RingPath, side: Side) -> tuple[Journey, ...]:
    """The journey of every rank's keys or queries."""
    found = []
    for owner in range(path.num_ranks):
        hops: list[int] = [0]
        parts: list[range] = []
        for hop in range(1, path.num_ranks):
            rows = wanted_rows(dealing, owner, path.visited(owner, hop), side, mask)
            if rows:
                hops.append(hop)
                parts.extend(rows)
        found.append(Journey(united(parts), hops[min(1, len(hops) - 1)], hops[-1]))
    return tuple(found)


@dataclass(frozen=True)
class Heads:
    """The heads of an attention: query heads, key heads, and elements of one."""

    query: int
    key: int
    dim: int


def travelling_bytes(side: Side, heads: Heads, element_bytes: int) -> tuple[int, int]:
    """Of one row that visits, and of the sums that follow it: (k, v) and their gradients; or (q, the output's gradient,
    the output, lse) and the gradient of q."""
    wide = accumulator_bytes(element_bytes)
    if side == "keys":
        return 2 * heads.key * heads.dim * element_bytes, 2 * heads.key * heads.dim * wide
    return heads.query * (3 * heads.dim * element_bytes + wide), heads.query * heads.dim * wide


def cheaper_backward(heads: Heads, element_bytes: int) -> Side:
    """What goes around in the backward pass: whichever is fewer bytes a row. Keys, where it makes no difference.

    (Forward, queries would have to come back with outputs in the place of a gradient, and are never fewer.)
    """
    keys, queries = (sum(travelling_bytes(side, heads, element_bytes)) for side in ("keys", "queries"))
    return "queries" if queries < keys else "keys"


def ring_traffic(
    dealing: Dealing,
    mask: MaskRule,
    heads: Heads,
    *,
    batch_size: int,
    element_bytes: int,
    inner: int | None = None,
    backward: Side | Literal["cheaper"] = "cheaper",
) -> list[RankTraffic]:
    """What each rank sends in one ring attention.

    Keys and values are one message a hop. In the backward pass what ``backward`` says goes around: keys and values as
    one message, or queries as two, and the sums that follow are one more. Where all ranks want all keys that is P - 1
    messages a rank forward and 2 (P - 1) backward.
    """
    side = cheaper_backward(heads, element_bytes) if backward == "cheaper" else backward
    forward = _sent(dealing, mask, "keys", inner, batch_size, travelling_bytes("keys", heads, element_bytes))
    back = _sent(dealing, mask, side, inner, batch_size, travelling_bytes(side, heads, element_bytes))
    visitors = 1 if side == "keys" else 2
    return [
        RankTraffic(f.visit_bytes, f.visits, b.visit_bytes + b.follow_bytes, visitors * b.visits + b.follows)
        for f, b in zip(forward, back, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Sent:
    visit_bytes: int
    visits: int
    follow_bytes: int
    follows: int


def _sent(
    dealing: Dealing, mask: MaskRule, side: Side, inner: int | None, batch_size: int, row_bytes: tuple[int, int]
) -> list[_Sent]:
    path = RingPath(len(dealing), inner, reverse=side == "queries")
    ways = journeys(dealing, mask, path, side)
    result = []
    for rank in range(path.num_ranks):
        passing = [(hop, ways[path.owner(rank, hop)]) for hop in range(path.num_ranks)]
        visits = [way.num_rows for hop, way in passing if way.last > hop]
        follows = [way.num_rows for hop, way in passing if 0 < way.first <= hop <= way.last]
        visit_bytes, follow_bytes = (size * batch_size for size in row_bytes)
        result.append(_Sent(sum(visits) * visit_bytes, len(visits), sum(follows) * follow_bytes, len(follows)))
    return result
