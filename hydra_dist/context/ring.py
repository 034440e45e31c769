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

from collections.abc import Callable

import torch
from torch import Tensor

from hydra_dist.attention import attend_tiles, merge_rule
from hydra_dist.context.geometry import RingSchedule
from hydra_dist.context.rotation import Followers, Visitors
from hydra_dist.context.transport import Transport
from hydra_dist.context.travelling import Keys, KeysAround, Local, QueriesAround
from hydra_dist.costs.halves import halves
from hydra_dist.costs.needs import Side
from hydra_dist.costs.rotation import Heads, cheaper_backward

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
        keys = Keys(k, v)
        visits = Visitors(self.transport, schedule, keys.shapes, "forward", "keys")
        for hop, visitor in visits(keys.leaving(schedule.journeys[self.transport.rank].rows)):
            if hop == 0 or visitor is not None:
                k_here, v_here = (k, v) if visitor is None else visitor[0]
                tiles = schedule.tiles[hop]
                attend_tiles(q, k_here, v_here, tiles, scale=scale, out=out, lse=lse, fresh=hop == 0, rule=rule)
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
        key_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q in its dtype, and of k and v in ``key_dtype``; sums over hops and ranks are in fp32 or
        wider.

        Args:
            grad_out: the gradient of ``out``.
            out, lse: what ``forward`` returned.
        """
        heads = Heads(q.shape[2], k.shape[2], q.shape[3])
        side = self.backward_rotates or cheaper_backward(heads, q.element_size())
        schedule = self.schedule_of(causal, window, side)
        rows = schedule.journeys[self.transport.rank].rows
        local = Local(grad_out, q, k, v, out, lse, scale)
        around = KeysAround(local) if side == "keys" else QueriesAround(local)
        visits = Visitors(self.transport, schedule, around.shapes, "backward", around.kind)
        followers = Followers(self.transport, schedule, around.sum_shape, around.sums_kind, around.come_home)
        now, later = halves(schedule.tiles[0]) if rows else (schedule.tiles[0], ())
        for hop, visitor in visits(around.leaving(rows)):
            if hop == 0:
                local.add(now)
                continue
            added = None
            if visitor is not None and schedule.tiles[hop]:
                added = followers.zeros(hop)
                around.add(visitor, schedule.tiles[hop], added)
            followers.pass_on(hop, added)
        local.add(later)
        followers.finish()
        return local.gradients(key_dtype)
