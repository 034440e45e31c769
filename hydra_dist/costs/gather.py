"""Keys and values gathered from the ranks that hold them: who sends which rows to whom, and what that moves."""

from dataclasses import dataclass

from hydra_dist.costs.layout import Chunk, Dealing, offsets
from hydra_dist.costs.needs import MaskRule, wanted_rows
from hydra_dist.costs.rotation import Heads, travelling_bytes
from hydra_dist.costs.traffic import RankTraffic

SMALLEST_SLICE = 1 << 20
"""Bytes of keys and values that a slice of heads has over the whole sequence; narrower ones only make more messages."""


@dataclass(frozen=True, slots=True)
class Share:
    """Rows [row, row + len(positions)) of ``owner``, which hold ``positions``, for one reader."""

    owner: int
    row: int
    positions: Chunk


def shares(dealing: Dealing, owner: int, reader: int, mask: MaskRule) -> list[Share]:
    """What ``reader`` wants of ``owner``'s keys, one share for each run of positions; all of them where it is itself.

    Empty chunks of a mask are empty here too.
    """
    held = dealing[owner]
    rows = (range(sum(map(len, held))),) if owner == reader else wanted_rows(dealing, owner, reader, "keys", mask)
    found = []
    for part in rows:
        for chunk, offset in zip(held, offsets(held), strict=True):
            first = max(part.start, offset)
            own = chunk[first - offset : max(0, part.stop - offset)]
            if len(own):
                found.append(Share(owner, first, own))
    return found


def heads_of_slices(num_key_heads: int, whole_head_bytes: int) -> list[range]:
    """Which key heads are gathered at a time: as few as make ``SMALLEST_SLICE``, so that memory stays bounded.

    Args:
        whole_head_bytes: of the keys and values of one head over the whole sequence and batch.
    """
    width = min(num_key_heads, max(1, -(-SMALLEST_SLICE // max(1, whole_head_bytes))))
    return [range(first, min(first + width, num_key_heads)) for first in range(0, num_key_heads, width)]


def gather_traffic(
    dealing: Dealing, mask: MaskRule, heads: Heads, *, batch_size: int, element_bytes: int
) -> list[RankTraffic]:
    """What each rank sends in one attention: its keys and values to every rank that wants them, forward and backward,
    and in the backward pass the gradients of those it was sent; a message for each share and slice of heads."""
    num_ranks = len(dealing)
    key_bytes, gradient_bytes = (size * batch_size for size in travelling_bytes("keys", heads, element_bytes))
    sequence_length = sum(len(chunk) for held in dealing for chunk in held)
    slices = len(heads_of_slices(heads.key, sequence_length * key_bytes // heads.key))
    rows = [[0] * num_ranks for _ in range(num_ranks)]  # [owner][reader]
    messages = [[0] * num_ranks for _ in range(num_ranks)]
    for owner in range(num_ranks):
        for reader in range(num_ranks):
            if owner != reader:
                found = shares(dealing, owner, reader, mask)
                rows[owner][reader] = sum(len(share.positions) for share in found)
                messages[owner][reader] = len(found) * slices
    traffic = []
    for rank in range(num_ranks):
        sent, returned = sum(rows[rank]), sum(row[rank] for row in rows)
        there, back = sum(messages[rank]), sum(row[rank] for row in messages)
        traffic.append(RankTraffic(sent * key_bytes, there, sent * key_bytes + returned * gradient_bytes, there + back))
    return traffic
