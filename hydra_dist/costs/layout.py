"""Who holds which rows of a sequence that is spread over ranks, and what that moves between them.

A layout deals the positions of one sequence to the ranks of a context-parallel group. ``contiguous`` gives each rank
one piece. ``zigzag`` cuts the sequence into two pieces a rank and pairs an early piece with a late one, so that under a
causal mask every rank has the same number of (query, key) pairs to compute. Lengths need not divide: pieces then
differ by one row.

A *chunk* is a half-open range (start, stop) of positions; a rank's rows are its chunks one after another.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hydra_dist.errors import ConfigError, nearest

Chunk = tuple[int, int]
LAYOUTS = ("zigzag", "contiguous")


def chunks(layout: str, sequence_length: int, num_ranks: int) -> list[list[Chunk]]:
    """The chunks of every rank, in ascending order.

    Args:
        layout: ``zigzag`` (the i-th of 2P pieces is [i S // 2P, (i + 1) S // 2P), and rank r holds the pieces r and
            2P - 1 - r) or ``contiguous`` (rank r holds the r-th of P pieces). Pieces of one rank that touch are one
            chunk, so that one rank has one chunk in either layout.
        sequence_length: rows of the whole sequence, S.
        num_ranks: P.

    Raises:
        ConfigError: an unknown layout, or a sequence with fewer rows than pieces.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"context.layout: {layout}{nearest(layout, LAYOUTS)}; {' and '.join(LAYOUTS)} exist")
    if num_ranks < 1:
        raise ConfigError(f"context.size {num_ranks}: a sequence needs at least 1 rank; 1 works")
    num_pieces = 2 * num_ranks if layout == "zigzag" and num_ranks > 1 else num_ranks
    if sequence_length < num_pieces:
        raise ConfigError(_too_short(layout, sequence_length, num_ranks, num_pieces))
    edges = [i * sequence_length // num_pieces for i in range(num_pieces + 1)]
    pieces = list(pairwise(edges))
    if num_pieces == num_ranks:
        return [[piece] for piece in pieces]
    return [_joined([pieces[rank], pieces[num_pieces - 1 - rank]]) for rank in range(num_ranks)]


def lengths(all_chunks: Sequence[Sequence[Chunk]]) -> list[int]:
    """Rows that each rank holds."""
    return [sum(stop - start for start, stop in chunks_of_rank) for chunks_of_rank in all_chunks]


@dataclass(frozen=True, slots=True)
class HaloRun:
    """Neighbouring rows of a halo that one rank owns.

    Slot ``i`` of the halo of a chunk that starts at position s is position s - rows + i. Slots
    [slot, slot + length) of the halo of chunk ``chunk`` are the owner's local rows [row, row + length).
    """

    chunk: int
    slot: int
    length: int
    owner: int
    row: int


def halo_sources(all_chunks: Sequence[Sequence[Chunk]], rows: int) -> list[list[HaloRun]]:
    """For every rank, where the ``rows`` positions before each of its chunks are held.

    A chunk shorter than the halo makes a halo reach over several ranks, and under zigzag a rank may be its own
    predecessor. Positions before the sequence have no source and are left out. Sorted by chunk, then slot.
    """
    owned = sorted(
        (start, stop, rank, offset)
        for rank, chunks_of_rank in enumerate(all_chunks)
        for (start, stop), offset in zip(chunks_of_rank, _offsets(chunks_of_rank), strict=True)
    )
    starts = [start for start, *_ in owned]
    sources: list[list[HaloRun]] = []
    for chunks_of_rank in all_chunks:
        runs: list[HaloRun] = []
        for chunk, (chunk_start, _) in enumerate(chunks_of_rank):
            position = max(0, chunk_start - rows)
            while position < chunk_start:
                start, stop, owner, offset = owned[bisect_right(starts, position) - 1]
                length = min(stop, chunk_start) - position
                slot = position - (chunk_start - rows)
                runs.append(HaloRun(chunk, slot, length, owner, offset + position - start))
                position += length
        sources.append(runs)
    return sources


@dataclass(frozen=True, slots=True)
class Journey:
    """The hops around the ring that one rank's keys make: rank (owner + t) % P sees them at hop t.

    ``first`` and ``last`` are the first and the last hop at which some key is needed; both are 0 where no other rank
    needs any. Ranks in between that need none pass the keys on.
    """

    first: int
    last: int


def ring_journeys(
    all_chunks: Sequence[Sequence[Chunk]],
    *,
    causal: bool,
    window: int | None = None,
    documents: Sequence[Sequence[int]] | None = None,
) -> tuple[Journey, ...]:
    """How far the keys of each rank travel around the ring: as far as the last rank on their way that needs them.

    Args:
        causal, window: the mask, as in ``costs.tiles.tiles``.
        documents: for each batch row the sorted start positions of its documents, or None for one document. Keys travel
            as far as any batch row needs them.
    """
    num_ranks = len(all_chunks)
    first = [[_earliest_start(start, documents) for start, _ in held] for held in all_chunks]
    journeys = []
    for owner in range(num_ranks):
        needing = (
            hop
            for hop in range(1, num_ranks)
            if _needs(all_chunks, first, (owner + hop) % num_ranks, owner, causal, window)
        )
        hops = list(needing) or [0]
        journeys.append(Journey(hops[0], hops[-1]))
    return tuple(journeys)


@dataclass(frozen=True, slots=True)
class RankTraffic:
    """Bytes and messages that one rank sends in one call."""

    forward_bytes: int
    forward_messages: int
    backward_bytes: int
    backward_messages: int


def ring_traffic(
    all_chunks: Sequence[Sequence[Chunk]],
    journeys: Sequence[Journey],
    *,
    batch_size: int,
    num_key_heads: int,
    head_dim: int,
    element_bytes: int,
    accumulator_bytes: int = 4,
) -> list[RankTraffic]:
    """What each rank sends in one ring attention.

    Keys and values make the hops of their journey forward, and the same hops again in the backward pass. Their
    gradients follow them one hop behind, from the first rank that needed the keys on, and the last one sends them home.
    Where all ranks need all keys that is P - 1 messages a rank forward and 2 (P - 1) backward.
    """
    num_ranks, held = len(all_chunks), lengths(all_chunks)
    row_values = 2 * batch_size * num_key_heads * head_dim
    traffic = []
    for rank in range(num_ranks):
        owners = [(rank - hop) % num_ranks for hop in range(num_ranks)]
        keys = [held[owner] for hop, owner in enumerate(owners) if journeys[owner].last > hop]
        gradients = [
            held[owner] for hop, owner in enumerate(owners) if 0 < journeys[owner].first <= hop <= journeys[owner].last
        ]
        key_bytes = sum(keys) * row_values * element_bytes
        gradient_bytes = sum(gradients) * row_values * accumulator_bytes
        traffic.append(RankTraffic(key_bytes, len(keys), key_bytes + gradient_bytes, len(keys) + len(gradients)))
    return traffic


def halo_traffic(
    all_chunks: Sequence[Sequence[Chunk]], parts: Sequence[tuple[int, int]], *, batch_size: int
) -> list[RankTraffic]:
    """What each rank sends in one halo exchange, backward the mirror of forward.

    Args:
        parts: (rows, bytes of one row) for each tensor that takes part; gradients have the dtype of their tensor.
    """
    num_ranks = len(all_chunks)
    moved = [[0] * num_ranks for _ in range(num_ranks)]  # [source][destination], bytes
    for rows, row_bytes in parts:
        for destination, runs in enumerate(halo_sources(all_chunks, rows)):
            for run in runs:
                moved[run.owner][destination] += run.length * row_bytes * batch_size
    for rank in range(num_ranks):
        moved[rank][rank] = 0
    sent = [[amount for amount in row if amount] for row in moved]
    returned = [[amount for amount in column if amount] for column in zip(*moved, strict=True)]
    return [RankTraffic(sum(s), len(s), sum(r), len(r)) for s, r in zip(sent, returned, strict=True)]


def _joined(pieces: list[Chunk]) -> list[Chunk]:
    """Ascending pieces with those that touch made one."""
    joined: list[Chunk] = []
    for start, stop in pieces:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _offsets(chunks_of_rank: Sequence[Chunk]) -> list[int]:
    """The local row at which each chunk begins."""
    offsets, row = [], 0
    for start, stop in chunks_of_rank:
        offsets.append(row)
        row += stop - start
    return offsets


def _earliest_start(position: int, documents: Sequence[Sequence[int]] | None) -> int:
    """Where the document of ``position`` begins, in the batch row in which it begins first."""
    if documents is None:
        return 0
    return min(starts[bisect_right(starts, position) - 1] for starts in documents)


def _needs(
    all_chunks: Sequence[Sequence[Chunk]],
    first: Sequence[Sequence[int]],
    rank: int,
    owner: int,
    causal: bool,
    window: int | None,
) -> bool:
    """Whether a query of ``rank`` sees a key of ``owner``.

    It is enough to look at the rows of two chunks that face each other, because documents are runs of positions.
    ``first`` says for each chunk where the document of its first row begins.
    """
    for (q_start, q_stop), q_first in zip(all_chunks[rank], first[rank], strict=True):
        for (k_start, k_stop), k_first in zip(all_chunks[owner], first[owner], strict=True):
            if k_start < q_start:
                if q_first < k_stop and (window is None or q_start - (k_stop - 1) < window):
                    return True
            elif not causal and window is None and k_first < q_stop:
                return True
    return False


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
