"""Moving tensors between the ranks of a context-parallel group: the one interface that strategies know.

Every call returns at once with a :class:`Work`; its ``wait()`` makes the received tensors valid and the sent ones free
to be changed. All ranks of the group make the same calls in the same order, except that an exchange a rank has no part
in may be left out by it. Tensors are contiguous and live on the transport's device.

What is sent is counted by direction (``forward`` or ``backward``) and by kind (a name the caller chooses).
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hydra_dist.errors import RunError

Direction = Literal["forward", "backward"]
Message = tuple[int, Tensor]
"""A rank of the group, and the tensor to send to it or to fill with what it sends."""


class TransportTimeoutError(RunError):
    """A rank waited for another one for longer than the timeout."""


class Work(ABC):
    """A transfer under way."""

    @abstractmethod
    def wait(self) -> None:
        """Return when received tensors can be read and sent ones may be changed (on a GPU: by its current stream).

        Raises:
            RunError: a peer did not answer in time or is gone; the message names this rank and its peers.
        """


class Finished(Work):
    """A transfer in which there was nothing to do."""

    def wait(self) -> None:
        return None


@dataclass
class Count:
    """What one rank sent: payload bytes, messages, and the calls that moved anything (hops)."""

    bytes: int = 0
    messages: int = 0
    hops: int = 0

    def add(self, num_bytes: int, messages: int) -> None:
        self.bytes += num_bytes
        self.messages += messages
        self.hops += 1


class Traffic:
    """Counts by direction and kind. What is counted here is counted in ``parent`` too."""

    def __init__(self, parent: "Traffic | None" = None) -> None:
        self.parent = parent
        self.counts: dict[tuple[Direction, str], Count] = {}

    def add(self, direction: Direction, kind: str, num_bytes: int, messages: int) -> None:
        self.counts.setdefault((direction, kind), Count()).add(num_bytes, messages)
        if self.parent is not None:
            self.parent.add(direction, kind, num_bytes, messages)

    def stats(self) -> dict[str, dict[str, Any]]:
        """{"forward": counts, "backward": counts}, where counts are "bytes", "messages", "hops", and "kinds", which has
        the same three by kind."""
        result: dict[str, dict[str, Any]] = {}
        for direction in ("forward", "backward"):
            kinds = {kind: count for (way, kind), count in self.counts.items() if way == direction}
            result[direction] = {
                "bytes": sum(count.bytes for count in kinds.values()),
                "messages": sum(count.messages for count in kinds.values()),
                "hops": sum(count.hops for count in kinds.values()),
                "kinds": {kind: vars(count).copy() for kind, count in kinds.items()},
            }
        return result


class Transport(ABC):
    """The ranks of one group, seen from one of them.

    Attributes:
        rank, size: this rank's index in the group, and the number of ranks.
        device: where tensors live.
        traffic: what this rank sent.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.traffic = Traffic()

    @property
    def next_rank(self) -> int:
        return (self.rank + 1) % self.size

    @property
    def previous_rank(self) -> int:
        return (self.rank - 1) % self.size

    def counting(self, traffic: Traffic) -> "Transport":
        """The same ranks and the same wires, with ``traffic`` in the place of this one's own counts."""
        twin = copy.copy(self)
        twin.traffic = traffic
        return twin

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], *, direction: Direction, kind: str
    ) -> Work:
        """Send to and receive from any ranks of the group at once. Empty tensors are left out on both sides.

        Messages between the same two ranks arrive in the order in which they were sent.

        Raises:
            ValueError: a peer that is this rank or not in the group, or a tensor that is not contiguous.
        """
        sends = [message for message in sends if message[1].numel()]
        receives = [message for message in receives if message[1].numel()]
        for peer, tensor in (*sends, *receives):
            if peer == self.rank or not 0 <= peer < self.size:
                raise ValueError(f"rank {self.rank} of {self.size} cannot exchange with rank {peer}")
            self._check(tensor)
        if not sends and not receives:
            return Finished()
        self.traffic.add(direction, kind, sum(_bytes(tensor) for _, tensor in sends), len(sends))
        return self._exchange(sends, receives, f"{direction} {kind}")

    def all_to_all(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], *, direction: Direction, kind: str
    ) -> Work:
        """inputs[p] goes to rank p, outputs[p] comes from rank p; sizes may differ. All of one dtype."""
        self._check(*outputs, *inputs, dtype=inputs[0].dtype, count=2 * self.size)
        others = [tensor for peer, tensor in enumerate(inputs) if peer != self.rank and tensor.numel()]
        self.traffic.add(direction, kind, sum(map(_bytes, others)), len(others))
        return self._all_to_all(list(outputs), list(inputs), f"{direction} {kind}")

    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor, *, direction: Direction, kind: str) -> Work:
        """outputs[p] becomes rank p's ``tensor``; sizes may differ. Counted as a message to every other rank."""
        self._check(*outputs, tensor, dtype=tensor.dtype, count=self.size + 1)
        self.traffic.add(direction, kind, _bytes(tensor) * (self.size - 1), self.size - 1)
        return self._all_gather(list(outputs), tensor, f"{direction} {kind}")

    def reduce_scatter(self, output: Tensor, inputs: Sequence[Tensor], *, direction: Direction, kind: str) -> Work:
        """``output`` becomes the sum over ranks of their inputs[rank of this rank]; sizes may differ between ranks.

        Counted as a message to every other rank.
        """
        self._check(output, *inputs, dtype=output.dtype, count=self.size + 1)
        others = [tensor for peer, tensor in enumerate(inputs) if peer != self.rank]
        self.traffic.add(direction, kind, sum(map(_bytes, others)), len(others))
        return self._reduce_scatter(output, list(inputs), f"{direction} {kind}")

    def all_reduce(self, tensor: Tensor, *, direction: Direction, kind: str) -> Work:
        """``tensor`` becomes the sum over ranks. Counted as the 2 (P - 1) messages of 1 / P of a ring, rounded up."""
        self._check(tensor)
        messages = 2 * (self.size - 1)
        self.traffic.add(direction, kind, messages * -(-_bytes(tensor) // self.size), messages)
        return self._all_reduce(tensor, f"{direction} {kind}")

    def _check(self, *tensors: Tensor, dtype: torch.dtype | None = None, count: int | None = None) -> None:
        if count is not None and len(tensors) != count:
            raise ValueError(f"{len(tensors)} tensors for a collective over {self.size} ranks, which takes {count}")
        for tensor in tensors:
            if not tensor.is_contiguous():
                raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is sent or received but not contiguous")
            if dtype is not None and tensor.dtype != dtype:
                raise ValueError(f"one collective over {dtype} and {tensor.dtype}; cast to one dtype first")

    @abstractmethod
    def _exchange(self, sends: list[Message], receives: list[Message], label: str) -> Work: ...

    @abstractmethod
    def _all_to_all(self, outputs: list[Tensor], inputs: list[Tensor], label: str) -> Work: ...

    @abstractmethod
    def _all_gather(self, outputs: list[Tensor], tensor: Tensor, label: str) -> Work: ...

    @abstractmethod
    def _reduce_scatter(self, output: Tensor, inputs: list[Tensor], label: str) -> Work: ...

    @abstractmethod
    def _all_reduce(self, tensor: Tensor, label: str) -> Work: ...


class OneRank(Transport):
    """A group of one: nothing is sent, and collectives are copies."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(0, 1, device)

    def _exchange(self, sends: list[Message], receives: list[Message], label: str) -> Work:
        raise AssertionError("a group of one rank has no peer")

    def _all_to_all(self, outputs: list[Tensor], inputs: list[Tensor], label: str) -> Work:
        outputs[0].copy_(inputs[0])
        return Finished()

    def _all_gather(self, outputs: list[Tensor], tensor: Tensor, label: str) -> Work:
        outputs[0].copy_(tensor)
        return Finished()

    def _reduce_scatter(self, output: Tensor, inputs: list[Tensor], label: str) -> Work:
        output.copy_(inputs[0])
        return Finished()

    def _all_reduce(self, tensor: Tensor, label: str) -> Work:
        return Finished()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
