"""Attention over gathered keys: every rank is sent the keys and values that its queries see, and computes alone.

A slice of key heads at a time, so that what is gathered stays small; the next slice is on its way while one is worked
on. Backward, keys are gathered again, and each rank sends the gradients of what it was sent to the rank it came from,
which adds them up in the order of the ranks, in fp32 or wider. (A collective would send every row to every rank, and
sum in an order of its own.)

Source: the keys' all-gather of Llama 3 (Grattafiori et al. 2024, arXiv 2407.21783, section 3.3.2).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_dist.attention import attend_tiles, attend_tiles_backward, merge_rule
from hydra_dist.context.transport import Direction, Finished, Transport, Work
from hydra_dist.context.travelling import wide
from hydra_dist.costs.gather import Share, heads_of_slices, shares
from hydra_dist.costs.layout import Dealing
from hydra_dist.costs.needs import MaskRule
from hydra_dist.costs.tiles import Span, Tile, tiles


@dataclass(frozen=True)
class Gathering:
    """What one rank gathers under a mask.

    Attributes:
        takes: what is gathered, side by side in this order; this rank's own rows among it.
        gives: for each other rank, what it is sent, in the order in which it takes it.
        tiles: of this rank's queries over what is gathered.
    """

    takes: tuple[Share, ...]
    gives: tuple[tuple[int, Share], ...]
    tiles: tuple[Tile, ...]

    @property
    def num_rows(self) -> int:
        return sum(len(share.positions) for share in self.takes)


GatheringOf = Callable[[bool, int | None], Gathering]
"""(causal, window) -> what this rank gathers."""


def gathering(dealing: Dealing, rank: int, mask: MaskRule, spans: list[Span]) -> Gathering:
    """What ``rank``, whose rows are ``spans``, gathers; in the order of positions, so that tiles are few and large."""

    def taken_by(reader: int) -> list[Share]:
        found = [share for owner in range(len(dealing)) for share in shares(dealing, owner, reader, mask)]
        return sorted(found, key=lambda share: share.positions.start)

    takes = taken_by(rank)
    gives = [
        (reader, share)
        for reader in range(len(dealing))
        if reader != rank
        for share in sorted(shares(dealing, rank, reader, mask), key=lambda share: share.positions.start)
    ]
    keys, count = [], 0
    for share in takes:
        keys.append(Span(count, count + len(share.positions), share.positions.start, share.positions.step))
        count += len(share.positions)
    found = tiles(spans, keys, causal=mask.causal, window=mask.window, documents=mask.documents)
    return Gathering(tuple(takes), tuple(gives), found)


class AllGather:
    """Attention of local queries over gathered keys; the interface of ``Ring``.

    Args:
        transport: to the ranks that share the sequence.
        gathering_of: what is gathered for a mask.
        sequence_length: of the whole sequence; all ranks cut heads into slices by it.
    """

    def __init__(self, transport: Transport, gathering_of: GatheringOf, sequence_length: int) -> None:
        self.transport = transport
        self.gathering_of = gathering_of
        self.sequence_length = sequence_length

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
        """out [B, S_local, Hq, D] in q's dtype and lse [B, Hq, S_local] in fp32 or wider."""
        found = self.gathering_of(causal, window)
        rule = merge_rule(logit_bound)
        out, lse = rule.start(q)
        for queries, _, keys, values in self._slices(q, k, v, found, "forward"):
            attend_tiles(
                q[:, :, queries],
                keys,
                values,
                found.tiles,
                scale=scale,
                out=out[:, :, queries],
                lse=lse[:, queries],
                fresh=True,
                rule=rule,
            )
            del keys, values  # before the slice after the next one is gathered
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
        """The gradients of q in its dtype, and of k and v in ``key_dtype``; sums over ranks are in fp32 or wider."""
        found = self.gathering_of(causal, window)
        grad_q = q.new_zeros(q.shape, dtype=wide(q))
        grad_k, grad_v = k.new_zeros(k.shape, dtype=wide(k)), v.new_zeros(v.shape, dtype=wide(v))
        home = _Home(self.transport, found)
        for queries, heads, keys, values in self._slices(q, k, v, found, "backward"):
            sums = k.new_zeros((found.num_rows, 2, *keys.shape[::2], k.shape[3]), dtype=wide(k))
            attend_tiles_backward(
                grad_out[:, :, queries],
                q[:, :, queries],
                keys,
                values,
                out[:, :, queries],
                lse[:, queries],
                found.tiles,
                scale=scale,
                grad_q=grad_q[:, :, queries],
                grad_k=sums[:, 0].transpose(0, 1),
                grad_v=sums[:, 1].transpose(0, 1),
            )
            home.send(sums, grad_k[:, :, heads], grad_v[:, :, heads])
            del keys, values
        home.settle()
        return grad_q.to(q.dtype), grad_k.to(key_dtype), grad_v.to(key_dtype)

    def _slices(
        self, q: Tensor, k: Tensor, v: Tensor, found: Gathering, direction: Direction
    ) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Yield (query heads, key heads, keys, values) [B, gathered rows, heads, D]; the next slice is under way."""
        B, _, Hk, D = k.shape
        group = q.shape[2] // Hk
        parts = heads_of_slices(Hk, 2 * B * self.sequence_length * D * k.element_size())
        coming = self._start(k, v, parts[0], found, direction)
        for index, part in enumerate(parts):
            gathered, work, _ = coming
            if index + 1 < len(parts):
                following = self._start(k, v, parts[index + 1], found, direction)
            work.wait()
            heads, queries = slice(part.start, part.stop), slice(group * part.start, group * part.stop)
            yield queries, heads, gathered[:, 0].transpose(0, 1), gathered[:, 1].transpose(0, 1)
            coming = following if index + 1 < len(parts) else coming

    def _start(
        self, k: Tensor, v: Tensor, part: range, found: Gathering, direction: Direction
    ) -> tuple[Tensor, Work, Tensor]:
        """Begin to gather a slice of heads: [rows, 2, B, heads, D], rows first, so that each share is one piece."""
        heads = slice(part.start, part.stop)
        own = torch.stack([k[:, :, heads].transpose(0, 1), v[:, :, heads].transpose(0, 1)], 1).contiguous()
        gathered = own.new_empty(found.num_rows, *own.shape[1:])
        rank = self.transport.rank
        receives = []
        places = gathered.split([len(share.positions) for share in found.takes])
        for share, place in zip(found.takes, places, strict=True):
            if share.owner == rank:
                place.copy_(own.narrow(0, share.row, len(share.positions)))
            else:
                receives.append((share.owner, place))
        sends = [(reader, own.narrow(0, share.row, len(share.positions))) for reader, share in found.gives]
        return gathered, self.transport.exchange(sends, receives, direction=direction, kind="keys"), own


class _Home:
    """Sends gradients of gathered rows to their owners, and adds up what comes for this rank's."""

    def __init__(self, transport: Transport, found: Gathering) -> None:
        self.transport, self.found = transport, found
        self._work: Work = Finished()
        self._came: list[tuple[int, Share, Tensor]] = []
        self._sums: tuple[Tensor, Tensor] | None = None

    def send(self, sums: Tensor, grad_k: Tensor, grad_v: Tensor) -> None:
        """Begin with one slice: ``sums`` [gathered rows, 2, B, heads, D], to be added to grad_k and grad_v."""
        self.settle()
        rank = self.transport.rank
        self._sums = grad_k, grad_v
        sends = []
        takes = self.found.takes
        for share, part in zip(takes, sums.split([len(share.positions) for share in takes]), strict=True):
            if share.owner == rank:
                self._came.append((rank, share, part))
            else:
                sends.append((share.owner, part))
        for reader, share in self.found.gives:
            room = sums.new_empty(len(share.positions), *sums.shape[1:])
            self._came.append((reader, share, room))
        receives = [(reader, room) for reader, _, room in self._came if reader != rank]
        self._work = self.transport.exchange(sends, receives, direction="backward", kind="key gradients")

    def settle(self) -> None:
        """Wait for the last slice and add it up, in the order of the ranks."""
        self._work.wait()
        for _, share, part in sorted(self._came, key=lambda came: came[0]):
            assert self._sums is not None
            for total, added in zip(self._sums, part.unbind(1), strict=True):
                total.narrow(1, share.row, len(share.positions)).add_(added.transpose(0, 1))
        self._came, self._sums, self._work = [], None, Finished()
