"""Rows exchanged for heads: which ranks can share the heads of an attention, and what that moves.

Source: Jacobs et al. 2023, "DeepSpeed Ulysses" (arXiv 2309.14509).
"""

from collections.abc import Sequence

from hydra_dist.costs.rotation import Heads
from hydra_dist.costs.traffic import RankTraffic, accumulator_bytes
from hydra_dist.errors import ConfigError


def can_share_heads(num_query_heads: int, num_key_heads: int, num_ranks: int) -> bool:
    """Whether every rank gets as many query heads, and as many key heads or a copy of one."""
    return num_query_heads % num_ranks == 0 and (num_key_heads % num_ranks == 0 or num_ranks % num_key_heads == 0)


def key_heads_per_rank(num_query_heads: int, num_key_heads: int, num_ranks: int) -> int:
    """How many key heads each rank works on. Where there are more ranks than key heads, several have the same one.

    Raises:
        ConfigError: heads that cannot be dealt evenly, with degrees that can.
    """
    if not can_share_heads(num_query_heads, num_key_heads, num_ranks):
        works = [
            size for size in range(1, num_query_heads + 1) if can_share_heads(num_query_heads, num_key_heads, size)
        ]
        raise ConfigError(
            f"context.ulysses_size {num_ranks}: {num_query_heads} query heads and {num_key_heads} key heads cannot be "
            f"dealt to {num_ranks} ranks (it must divide the query heads, and the key heads or be divided by them); "
            f"{' or '.join(map(str, works))} works"
        )
    return max(1, num_key_heads // num_ranks)


def ulysses_traffic(lengths: Sequence[int], heads: Heads, *, batch_size: int, element_bytes: int) -> list[RankTraffic]:
    """What each rank of a Ulysses group sends for one attention.

    Args:
        lengths: rows of each rank.

    A message for each of q, k, v and the output to every other rank, and backward for each of their gradients, which
    are in fp32 for keys and values that several ranks have.
    """
    num_ranks = len(lengths)
    if num_ranks == 1:
        return [RankTraffic(0, 0, 0, 0)]
    keys = key_heads_per_rank(heads.query, heads.key, num_ranks)
    queries = heads.query // num_ranks
    gradient_bytes = accumulator_bytes(element_bytes) if num_ranks > heads.key else element_bytes
    unit = batch_size * heads.dim
    traffic = []
    for rows in lengths:
        others, peers = sum(lengths) - rows, num_ranks - 1
        out = rows * peers * (queries + 2 * keys) * element_bytes + others * queries * element_bytes
        back = rows * peers * queries * element_bytes + others * (queries * element_bytes + 2 * keys * gradient_bytes)
        traffic.append(RankTraffic(out * unit, 4 * peers, back * unit, 4 * peers))
    return traffic
