"""Ring attention: keys and values go around, queries stay.

Every rank holds the queries, keys and values of its rows. At each hop it computes the attention of its queries over the
keys of another rank, while these keys are already on their way to the next one. Partial results merge by their
log-sum-exp, or by plain addition where scores are known to be small enough. Keys travel only as far as some rank on
their way needs them, and only those that some rank needs; the ranks know this from the mask.

Backward, the keys go around once more, and their gradients follow one hop behind and go home. Where a rank has few
query heads, its queries go around instead (with the output's gradient, the output and lse) and collect their gradient,
while keys, values and their gradients stay. What is fewer bytes is taken.

A rank's own rows are worked on last in part, to have something to do while gradients come home.

Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers" (arXiv 2310.01889); zigzag balance as in
Brandon et al. 2023 (arXiv 2311.09431) and later causal rings; moving queries in the backward pass and rings of rings as
in Sun et al. 2024, "BurstAttention" (arXiv 2403.09347).
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from hydra_dist.attention import attend_tiles, attend_tiles_backward, merge_rule
from hydra_dist.context.geometry import RingSchedule
from hydra_dist.context.rotation import Followers, Visitors, add_to_rows, rows_of
from hydra_dist.context.transport import Transport
from hydra_dist.costs.needs import Side
from hydra_dist.costs.rotation import Heads, cheaper_backward
from hydra_dist.costs.tiles import Tile

ScheduleOf = Callable[[bool, int | None, Side], RingSchedule]
"""(causal, window, what goes around) -> the schedule of this rank."""


class Ring:
    """Ring attention over the ranks of one group.

    Args:
        transport: to the ranks of the ring.
        schedule_of: the schedule for a mask.
        backward_rotates: ``keys``, ``queries``, or None for whichever is fewer bytes.
    """

    def __init__(self, transport: Transport, schedule_of: ScheduleOf, backward_rotates: Side | None = None) -> None:
        self.transport = transport
        self.schedule_of = schedule_of
        self.backward_rotates = backward_rotates

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
        schedule = self.schedule_of(causal, window, "keys")
        rule = merge_rule(logit_bound)
        out, lse = rule.start(q)
        visits = Visitors(self.transport, schedule, _shapes_of_keys(k), "forward", "keys")
        for hop, visitor in visits(self._leaving(schedule, k, v)):
            if hop == 0 or visitor is not None:
                keys, values = (k, v) if visitor is None else visitor[0]
                tiles = schedule.tiles[hop]
                attend_tiles(q, keys, values, tiles, scale=scale, out=out, lse=lse, fresh=hop == 0, rule=rule)
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
        heads = Heads(q.shape[2], k.shape[2], q.shape[3])
        side = self.backward_rotates or cheaper_backward(heads, q.element_size())
        schedule = self.schedule_of(causal, window, side)
        grad_q = q.new_zeros(q.shape, dtype=_wide(q))
        grad_k, grad_v = (x.new_zeros(x.shape, dtype=_wide(x)) for x in (k, v))
        queries, keys, grad_keys = (grad_out, q, out, lse), (k, v), (grad_k, grad_v)

        def add(
            queries: Sequence[Tensor],
            keys: Sequence[Tensor],
            tiles: Sequence[Tile],
            grad_q: Tensor,
            grad_keys: Iterable[Tensor],
        ) -> None:
            grad_out, q, out, lse = queries
            k, v = keys
            grad_k, grad_v = grad_keys
            attend_tiles_backward(
                grad_out, q, k, v, out, lse, tiles, scale=scale, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v
            )

        travels = schedule.journeys[self.transport.rank].rows

        def keys_home(came: Tensor) -> None:
            for total, part in zip(grad_keys, came, strict=True):
                add_to_rows(total, travels, part, 1)

        def queries_home(came: Tensor) -> None:
            add_to_rows(grad_q, travels, came, 1)

        if side == "keys":
            leaving = self._leaving(schedule, k, v)
            shapes, sums = _shapes_of_keys(k), _shapes_of_keys(grad_k)
            visits = Visitors(self.transport, schedule, shapes, "backward", "keys")
            gone = Followers(self.transport, schedule, sums, "key gradients", keys_home)
        else:
            leaving = self._queries_leaving(schedule, grad_out, q, out, lse)
            visits = Visitors(self.transport, schedule, _shapes_of_queries(q, lse), "backward", "queries")
            sums = _shapes_of_gradients(grad_q)
            gone = Followers(self.transport, schedule, sums, "query gradients", queries_home)

        own = schedule.tiles[0]
        cut = (len(own) + 1) // 2 if travels else len(own)
        for hop, visitor in visits(leaving):
            if hop == 0:
                add(queries, keys, own[:cut], grad_q, grad_keys)
                continue
            added = None
            if visitor is not None and schedule.tiles[hop]:
                added = gone.zeros(hop)
                if side == "keys":
                    add(queries, visitor[0].unbind(), schedule.tiles[hop], grad_q, added)
                else:
                    add((*visitor[0].unbind(), visitor[1]), keys, schedule.tiles[hop], added, grad_keys)
            gone.pass_on(hop, added)
        add(queries, keys, own[cut:], grad_q, grad_keys)
        gone.finish()
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)

    def _leaving(self, schedule: RingSchedule, k: Tensor, v: Tensor) -> list[Tensor]:
        """Keys and values that other ranks need, as one message."""
        rows = schedule.journeys[self.transport.rank].rows
        return [torch.stack([rows_of(k, rows, 1), rows_of(v, rows, 1)])] if rows else []

    def _queries_leaving(
        self, schedule: RingSchedule, grad_out: Tensor, q: Tensor, out: Tensor, lse: Tensor
    ) -> list[Tensor]:
        rows = schedule.journeys[self.transport.rank].rows
        if not rows:
            return []
        return [
            torch.stack([rows_of(x.to(q.dtype), rows, 1) for x in (grad_out, q, out)]),
            rows_of(lse, rows, 2).contiguous(),
        ]


def _shapes_of_keys(k: Tensor) -> Callable[[int], list[tuple[tuple[int, ...], torch.dtype]]]:
    B, _, Hk, D = k.shape
    return lambda rows: [((2, B, rows, Hk, D), k.dtype)]


def _shapes_of_queries(q: Tensor, lse: Tensor) -> Callable[[int], list[tuple[tuple[int, ...], torch.dtype]]]:
    B, _, Hq, D = q.shape
    return lambda rows: [((3, B, rows, Hq, D), q.dtype), ((B, Hq, rows), lse.dtype)]


def _shapes_of_gradients(grad_q: Tensor) -> Callable[[int], list[tuple[tuple[int, ...], torch.dtype]]]:
    B, _, Hq, D = grad_q.shape
    return lambda rows: [((B, rows, Hq, D), grad_q.dtype)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
