"""The rows before each chunk: where they are held, and what fetching them moves."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from hydra_dist.costs.layout import Chunk, Dealing, offsets
from hydra_dist.costs.traffic import RankTraffic


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


def has_halo(held: Sequence[Chunk]) -> bool:
    """Whether the rows before a chunk are a thing of its first rows only: consecutive positions within each."""
    return all(chunk.step == 1 for chunk in held)


def halo_sources(dealing: Dealing, rows: int) -> list[list[HaloRun]]:
    """For every rank, where the ``rows`` positions before each of its chunks are held.

    A chunk shorter than the halo makes a halo reach over several ranks, and under zigzag a rank may be its own
    predecessor. Positions before the sequence have no source and are left out. Sorted by chunk, then slot.

    Raises:
        ValueError: chunks of positions that are not consecutive.
    """
    if not all(map(has_halo, dealing)):
        raise ValueError("striped rows have no halo: the row before each of them is held by another rank")
    owned = sorted(
        (chunk.start, chunk.stop, rank, offset)
        for rank, held in enumerate(dealing)
        for chunk, offset in zip(held, offsets(held), strict=True)
    )
    starts = [start for start, *_ in owned]
    sources: list[list[HaloRun]] = []
    for held in dealing:
        runs: list[HaloRun] = []
        for index, chunk in enumerate(held):
            position = max(0, chunk.start - rows)
            while position < chunk.start:
                start, stop, owner, offset = owned[bisect_right(starts, position) - 1]
                length = min(stop, chunk.start) - position
                slot = position - (chunk.start - rows)
                runs.append(HaloRun(index, slot, length, owner, offset + position - start))
                position += length
        sources.append(runs)
    return sources


def halo_traffic(dealing: Dealing, parts: Sequence[tuple[int, int]], *, batch_size: int) -> list[RankTraffic]:
    """What each rank sends in one halo exchange, backward the mirror of forward.

    Args:
        parts: (rows, bytes of one row) for each tensor that takes part; gradients have the dtype of their tensor.
    """
    num_ranks = len(dealing)
    moved = [[0] * num_ranks for _ in range(num_ranks)]  # [source][destination], bytes
    for rows, row_bytes in parts:
        for destination, runs in enumerate(halo_sources(dealing, rows)):
            for run in runs:
                moved[run.owner][destination] += run.length * row_bytes * batch_size
    for rank in range(num_ranks):
        moved[rank][rank] = 0
    sent = [[amount for amount in row if amount] for row in moved]
    returned = [[amount for amount in column if amount] for column in zip(*moved, strict=True)]
    return [RankTraffic(sum(s), len(s), sum(r), len(r)) for s, r in zip(sent, returned, strict=True)]
