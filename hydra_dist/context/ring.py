"""Ring attention: keys and values go around, queries stay.

Every rank holds the queries, keys and values of its rows. At hop t it computes the attention of its queries over the
keys of the rank t places before it, while these keys are already on their way to the next rank. Partial results merge
by their log-sum-exp, or by plain addition where scores are known to be small enough. Keys travel only as far as some
rank on their way needs them; the ranks know this from the mask.

Backward, the keys go around once more. The gradients of the keys that visit are started by the first rank that
needs them, follow them one hop behind, and go home from the last one. A rank's own keys are worked on last in part, to
have something to do while the gradients come home.

Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers" (arXiv 2310.01889); zigzag balance as in
Brandon et al. 2023 (arXiv 2311.09431) and later causal rings.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hydra_dist.attention import attend_tiles, attend_tiles_backward, merge_rule
from hydra_dist.context.geometry import RingSchedule
from hydra_dist.context.transport import Direction, Finished, Message, Transport, Work
from hydra_dist.costs.tiles import Tile

ScheduleOf = Callable[[bool, int | None], RingSchedule]
"""(causal, window) -> the schedule of this rank."""


class Ring:
    """Ring attention over the ranks of one group.

    Args:
        transport: to the ranks of the ring.
        lengths: rows of every rank.
        schedule_of: the schedule for a mask.
    """

    def __init__(self, transport: Transport, lengths: list[int], schedule_of: ScheduleOf) -> None:
        self.transport = transport
        self.lengths = lengths
        self.schedule_of = schedule_of

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        window: int | None,
        scale: float,
        logit_bound: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of this rank's queries over all keys.

        Args:
            q: [B, S_local, Hq, D].
            k, v: [B, S_local, Hk, D].
            logit_bound: |score| never passes it; None: unknown. What ranks send does not depend on it.

        Returns:
            out [B, S_local, Hq, D] in q's dtype and lse [B, Hq, S_local] in fp32 or wider.
        """
        schedule = self.schedule_of(causal, window)
        rule = merge_rule(logit_bound)
        out, lse = rule.start(q)
        for hop, visitor in self._visits(k, v, schedule, "forward"):
            if visitor is not None:
                attend_tiles(
                    q,
                    *visitor,
                    schedule.tiles[hop],
                    scale=scale,
                    out=out,
                    lse=lse,
                    window=window,
                    fresh=hop == 0,
                    rule=rule,
                )
        return rule.finish(out, lse, q.dtype)

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v in their dtypes; sums over hops and ranks are in fp32 or wider.

        Args:
            grad_out: the gradient of ``out``.
            out, lse: what ``forward`` returned.
        """
        schedule = self.schedule_of(causal, window)
        rank, size, journeys = self.transport.rank, self.transport.size, schedule.journeys
        grad_q = q.new_zeros(q.shape, dtype=_wide(q))
        grad_k, grad_v = k.new_zeros(k.shape, dtype=_wide(k)), v.new_zeros(v.shape, dtype=_wide(v))

        def add_gradients(keys: tuple[Tensor, Tensor], tiles: Sequence[Tile], sums: tuple[Tensor, Tensor]) -> None:
            attend_tiles_backward(
                grad_out,
                q,
                *keys,
                out,
                lse,
                tiles,
                scale=scale,
                grad_q=grad_q,
                grad_k=sums[0],
                grad_v=sums[1],
                window=window,
            )

        own_tiles = schedule.tiles[0]
        cut = (len(own_tiles) + 1) // 2 if journeys[rank].last else len(own_tiles)
        moving: Work = Finished()
        follower: Tensor | None = None  # the gradients that follow the keys that visit next
        returned: Tensor | None = None  # the gradients of this rank's keys, from the last rank that they visited
        for hop, visitor in self._visits(k, v, schedule, "backward"):
            if hop == 0:
                add_gradients((k, v), own_tiles[:cut], (grad_k, grad_v))
                continue
            owner = (rank - hop) % size
            grad_keys = None
            if visitor is not None and schedule.tiles[hop]:
                grad_keys = self._room_for(owner, grad_k).zero_()
                add_gradients(visitor, schedule.tiles[hop], (grad_keys[0], grad_keys[1]))
            moving.wait()
            if returned is not None:
                grad_k += returned[0]
                grad_v += returned[1]
            if grad_keys is None:
                grad_keys = follower  # the keys only pass through
            elif follower is not None:
                grad_keys += follower

            sends: list[Message] = []
            receives: list[Message] = []
            follower = returned = None
            if grad_keys is not None:
                sends.append((self.transport.next_rank if journeys[owner].last > hop else owner, grad_keys))
            next_owner = (owner - 1) % size
            if 0 < journeys[next_owner].first <= hop < journeys[next_owner].last:
                follower = self._room_for(next_owner, grad_k)
                receives.append((self.transport.previous_rank, follower))
            if journeys[rank].last == hop:
                returned = self._room_for(rank, grad_k)
                receives.append(((rank + hop) % size, returned))
            moving = self.transport.exchange(sends, receives, direction="backward", kind="key gradients")
        add_gradients((k, v), own_tiles[cut:], (grad_k, grad_v))
        moving.wait()
        if returned is not None:
            grad_k += returned[0]
            grad_v += returned[1]
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)

    def _visits(
        self, k: Tensor, v: Tensor, schedule: RingSchedule, direction: Direction
    ) -> Iterator[tuple[int, tuple[Tensor, Tensor] | None]]:
        """Yield (hop, keys and values) for each hop, None where none come; the next hop is under way meanwhile.

        Keys and values are one message. What is yielded is overwritten two hops later.
        """
        rank, size, journeys = self.transport.rank, self.transport.size, schedule.journeys
        here: Tensor | None = torch.stack([k, v]) if journeys[rank].last else None  # [2, B, S of the owner, Hk, D]
        largest = 2 * k.shape[0] * max(self.lengths) * k.shape[2] * k.shape[3]
        buffers: dict[int, Tensor] = {}  # two, flat, each large enough for any rank's keys
        for hop in range(size):
            owner, next_owner = (rank - hop) % size, (rank - hop - 1) % size
            sends: list[Message] = []
            receives: list[Message] = []
            arriving = None
            if here is not None and journeys[owner].last > hop:
                sends.append((self.transport.next_rank, here))
            if hop + 1 < size and journeys[next_owner].last > hop:
                if hop % 2 not in buffers:
                    buffers[hop % 2] = k.new_empty(largest)
                arriving = _keys_in(buffers[hop % 2], k, self.lengths[next_owner])
                receives.append((self.transport.previous_rank, arriving))
            moving = self.transport.exchange(sends, receives, direction=direction, kind="keys")
            if hop == 0:
                yield hop, (k, v)
            else:
                yield hop, None if here is None else (here[0], here[1])
            moving.wait()
            here = arriving

    def _room_for(self, owner: int, grad_k: Tensor) -> Tensor:
        """Uninitialised room for the gradients of one rank's keys and values, [2, B, S of the owner, Hk, D]."""
        return grad_k.new_empty(2, grad_k.shape[0], self.lengths[owner], grad_k.shape[2], grad_k.shape[3])


def _keys_in(buffer: Tensor, k: Tensor, length: int) -> Tensor:
    """The start of a flat buffer as keys and values of ``length`` rows, [2, B, length, Hk, D]."""
    shape = (2, k.shape[0], length, k.shape[2], k.shape[3])
    return buffer[: 2 * k.shape[0] * length * k.shape[2] * k.shape[3]].view(shape)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
