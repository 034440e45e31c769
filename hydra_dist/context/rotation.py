"""Moving rows around a ring, two buffers deep, and the sums that follow them.

Which rows travel, how far and in which order is a ``RingSchedule``. What a row is made of (keys and values, or queries
and what belongs to them) only the caller knows: it gives the shapes of the tensors that make up a number of rows.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hydra_dist.context.geometry import RingSchedule
from hydra_dist.context.transport import Direction, Finished, Message, Transport, Work
from hydra_dist.costs.needs import Rows

Shape = tuple[tuple[int, ...], torch.dtype]
"""Of a tensor."""


class Visitors:
    """Rows of other ranks, one rank a hop.

    Args:
        transport: to the ranks of the ring.
        schedule: whose rows come when.
        shapes: of the tensors that hold a number of rows.
        direction, kind: under which it is counted.
    """

    def __init__(
        self,
        transport: Transport,
        schedule: RingSchedule,
        shapes: Callable[[int], list[Shape]],
        direction: Direction,
        kind: str,
    ) -> None:
        self.transport, self.schedule, self.shapes = transport, schedule, shapes
        self.direction, self.kind = direction, kind

    def __call__(self, own: Sequence[Tensor]) -> Iterator[tuple[int, Sequence[Tensor] | None]]:
        """Yield (hop, tensors) for each hop, None where nobody comes and at hop 0; the next hop is under way meanwhile.

        What is yielded is overwritten two hops later.

        Args:
            own: this rank's rows that leave it.
        """
        rank, size, ways = self.transport.rank, self.transport.size, self.schedule.journeys
        path = self.schedule.path
        here: Sequence[Tensor] | None = own if ways[rank].last else None
        largest = [math.prod(shape) for shape, _ in self.shapes(max(way.num_rows for way in ways))]
        buffers: dict[int, list[Tensor]] = {}  # two, flat, each large enough for the rows of any rank
        for hop in range(size):
            owner = path.owner(rank, hop)
            sends: list[Message] = []
            receives: list[Message] = []
            arriving = None
            if here is not None and ways[owner].last > hop:
                sends = [(path.visited(owner, hop + 1), tensor) for tensor in here]
            if hop + 1 < size:
                coming = path.owner(rank, hop + 1)
                if ways[coming].last > hop:
                    shapes = self.shapes(ways[coming].num_rows)
                    if hop % 2 not in buffers:
                        buffers[hop % 2] = [
                            torch.empty(number, dtype=dtype, device=self.transport.device)
                            for number, (_, dtype) in zip(largest, shapes, strict=True)
                        ]
                    arriving = [
                        buffer[: math.prod(shape)].view(shape)
                        for buffer, (shape, _) in zip(buffers[hop % 2], shapes, strict=True)
                    ]
                    receives = [(path.visited(coming, hop), tensor) for tensor in arriving]
            moving = self.transport.exchange(sends, receives, direction=self.direction, kind=self.kind)
            yield hop, None if hop == 0 else here
            moving.wait()
            here = arriving


class Followers:
    """Sums that follow visiting rows one hop behind, and go home from the last rank that adds to them.

    Args:
        transport, schedule: as for ``Visitors``.
        shape: of the sums of a number of rows, in fp32 or wider.
        kind: under which it is counted, backward.
        home: is given this rank's travelling rows and what came back for them.
    """

    def __init__(
        self,
        transport: Transport,
        schedule: RingSchedule,
        shape: Callable[[int], Shape],
        kind: str,
        home: Callable[[Rows, Tensor], None],
    ) -> None:
        self.transport, self.schedule, self.shape, self.kind, self.home = transport, schedule, shape, kind, home
        self._moving: Work = Finished()
        self._follower: Tensor | None = None
        self._returned: Tensor | None = None

    def zeros(self, hop: int) -> Tensor:
        """A fresh sum for the rows that visit at ``hop``."""
        return self._room(self.schedule.path.owner(self.transport.rank, hop)).zero_()

    def pass_on(self, hop: int, added: Tensor | None) -> None:
        """Merge what this rank adds at ``hop`` (None: nothing) into what came with the rows, and send it on."""
        transport, path, ways = self.transport, self.schedule.path, self.schedule.journeys
        rank, size = transport.rank, transport.size
        owner = path.owner(rank, hop)
        self._settle()
        if added is None:
            added = self._follower  # the rows only pass through
        elif self._follower is not None:
            added += self._follower
        sends: list[Message] = []
        receives: list[Message] = []
        self._follower = None
        if added is not None:
            sends.append((path.visited(owner, hop + 1) if ways[owner].last > hop else owner, added))
        if hop + 1 < size:
            coming = path.owner(rank, hop + 1)
            if 0 < ways[coming].first <= hop < ways[coming].last:
                self._follower = self._room(coming)
                receives.append((path.visited(coming, hop), self._follower))
        if ways[rank].last == hop:
            self._returned = self._room(rank)
            receives.append((path.visited(rank, hop), self._returned))
        self._moving = transport.exchange(sends, receives, direction="backward", kind=self.kind)

    def finish(self) -> None:
        """Wait for what is still under way."""
        self._settle()

    def _settle(self) -> None:
        self._moving.wait()
        self._moving = Finished()
        if self._returned is not None:
            self.home(self.schedule.journeys[self.transport.rank].rows, self._returned)
            self._returned = None

    def _room(self, owner: int) -> Tensor:
        shape, dtype = self.shape(self.schedule.journeys[owner].num_rows)
        return torch.empty(shape, dtype=dtype, device=self.transport.device)


def rows_of(x: Tensor, rows: Rows, dim: int) -> Tensor:
    """The given rows along ``dim``, side by side; a view where they are one range."""
    parts = [x.narrow(dim, part.start, len(part)) for part in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def add_to_rows(x: Tensor, rows: Rows, added: Tensor, dim: int) -> None:
    """x[rows] += added, in place."""
    done = 0
    for part in rows:
        x.narrow(dim, part.start, len(part)).add_(added.narrow(dim, done, len(part)))
        done += len(part)
