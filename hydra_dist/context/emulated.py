"""Ranks as threads of one process: the transport, the mesh and the launcher.

What runs is the code that runs over processes: real data, real ordering, the same calls. A message is copied when it is
sent and waits in a queue that belongs to its source and destination, so what a correct program computes does not
depend on how threads are scheduled. Mistakes that hang or corrupt a real run end in an error here: a rank that waits
for a message nobody sends, a message nobody receives, a message of another shape than its buffer, and a buffer that is
changed while it is under way.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor

from hydra_dist.context.transport import Message, Transport, TransportTimeoutError, Work
from hydra_dist.errors import ConfigError

T = TypeVar("T")
Lane = tuple[str, int, int, str]  # the group, the source and the destination in it, and point-to-point or collective


class Released(Exception):  # noqa: N818  (it reports another rank's error, not one of its own)
    """This rank stopped because another one failed."""


class Hub:
    """The queues between all emulated ranks of a run."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._queues: dict[Lane, deque[Tensor]] = {}
        self._changed = threading.Condition()
        self._aborted = False

    def put(self, lane: Lane, tensor: Tensor) -> None:
        with self._changed:
            self._queues.setdefault(lane, deque()).append(tensor)
            self._changed.notify_all()

    def get(self, lane: Lane, label: str) -> Tensor:
        """The oldest message of a lane. TransportTimeoutError where none comes; Released where the run was aborted."""
        group, source, destination, _ = lane
        deadline = time.monotonic() + self.timeout
        with self._changed:
            while not self._aborted:
                queue = self._queues.get(lane)
                if queue:
                    return queue.popleft()
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise TransportTimeoutError(
                        f"{group} rank {destination} waited {self.timeout:g} s for {group} rank {source} "
                        f"({label}), which sent nothing (timeout, context.timeout_seconds, is how long a rank waits)"
                    )
                self._changed.wait(remaining)
        raise Released(f"{group} rank {destination} was waiting for {group} rank {source} ({label})")

    def abort(self) -> None:
        """Release all who wait."""
        with self._changed:
            self._aborted = True
            self._changed.notify_all()

    def unreceived(self) -> list[str]:
        """One line for each lane with messages left over."""
        with self._changed:
            return [
                f"{len(queue)} message(s) from {group} rank {source} to {group} rank {destination} ({kind}), "
                f"first of shape {tuple(queue[0].shape)}"
                for (group, source, destination, kind), queue in sorted(self._queues.items())
                if queue
            ]


class EmulatedTransport(Transport):
    """One thread's end of the hub.

    Args:
        hub: shared by all ranks.
        group: a name that the ranks of one group share and no other group has.
        rank, size: this rank's index in the group, and the number of ranks.
    """

    def __init__(self, hub: Hub, group: str, rank: int, size: int, device: torch.device) -> None:
        super().__init__(rank, size, device)
        self.hub = hub
        self.group = group

    def _exchange(self, sends: list[Message], receives: list[Message], label: str) -> Work:
        sent = [(tensor, self._send(peer, tensor, "point-to-point")) for peer, tensor in sends]
        return _EmulatedWork(self, sent, receives, "point-to-point", label)

    def _all_to_all(self, outputs: list[Tensor], inputs: list[Tensor], label: str) -> Work:
        sent = [(tensor, self._send(peer, tensor, "collective")) for peer, tensor in enumerate(inputs)]
        return _EmulatedWork(self, sent, list(enumerate(outputs)), "collective", label)

    def _all_gather(self, outputs: list[Tensor], tensor: Tensor, label: str) -> Work:
        return self._all_to_all(outputs, [tensor] * self.size, label)

    def _reduce_scatter(self, output: Tensor, inputs: list[Tensor], label: str) -> Work:
        parts = [torch.empty_like(output) for _ in range(self.size)]
        return _SumWork(self._all_to_all(parts, inputs, label), output, parts)

    def _all_reduce(self, tensor: Tensor, label: str) -> Work:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        return _SumWork(self._all_to_all(parts, [tensor] * self.size, label), tensor, parts)

    def _send(self, peer: int, tensor: Tensor, kind: str) -> Tensor:
        message = tensor.detach().clone()
        self.hub.put((self.group, self.rank, peer, kind), message)
        return message


class _EmulatedWork(Work):
    """Receives in ``wait``, and sees to it that nobody changed what was sent in between."""

    def __init__(
        self,
        transport: EmulatedTransport,
        sent: Sequence[tuple[Tensor, Tensor]],
        receives: Sequence[Message],
        kind: str,
        label: str,
    ) -> None:
        self.transport, self.receives, self.kind, self.label = transport, receives, kind, label
        self.sent = [(tensor, message, _version(tensor)) for tensor, message in sent]

    def wait(self) -> None:
        transport = self.transport
        for tensor, message, version in self.sent:
            # The version counts changes anywhere in the tensor's storage, so it only says where to look.
            if _version(tensor) != version and not torch.equal(_as_bytes(tensor), _as_bytes(message)):
                raise RuntimeError(
                    f"{transport.group} rank {transport.rank}: a tensor of shape {tuple(tensor.shape)} was changed "
                    f"while it was under way ({self.label}); call wait() first"
                )
        for peer, tensor in self.receives:
            message = transport.hub.get((transport.group, peer, transport.rank, self.kind), self.label)
            if message.dtype != tensor.dtype or message.numel() != tensor.numel():
                raise RuntimeError(
                    f"{transport.group} rank {transport.rank} expected {tensor.numel()} x {tensor.dtype} from rank "
                    f"{peer} ({self.label}), which sent {message.numel()} x {message.dtype}"
                )
            with torch.no_grad():
                tensor.copy_(message.view(tensor.shape))
        self.receives, self.sent = (), []


class _SumWork(Work):
    """Adds what came in the order of the ranks, so that all of them get the same bits."""

    def __init__(self, work: Work, output: Tensor, parts: list[Tensor]) -> None:
        self.work, self.output, self.parts = work, output, parts

    def wait(self) -> None:
        self.work.wait()
        if self.parts:
            total = self.parts[0]
            for part in self.parts[1:]:
                total += part
            with torch.no_grad():
                self.output.copy_(total)
        self.parts = []


class EmulatedMesh:
    """One emulated rank's place in a ring x Ulysses grid; ranks of one Ulysses group are neighbours.

    Attributes:
        rank, size: among all ranks of the run.
        shape: (ring, ulysses).
        device: of this rank's tensors.
        hub: what all ranks of the run share.
        ring, ulysses: transports to the ranks that differ from this one in that dimension only.
        world: the transport to all ranks, for what a test wants to sum or compare.
    """

    def __init__(self, hub: Hub, rank: int, shape: tuple[int, int], device: torch.device) -> None:
        self.hub, self.rank, self.shape, self.device = hub, rank, shape, device
        self.size = shape[0] * shape[1]
        ring_rank, ulysses_rank = divmod(rank, shape[1])
        self.ring: Transport = EmulatedTransport(hub, _row("ring", ulysses_rank, shape[1]), ring_rank, shape[0], device)
        self.ulysses: Transport = EmulatedTransport(
            hub, _row("ulysses", ring_rank, shape[0]), ulysses_rank, shape[1], device
        )
        self.world: Transport = EmulatedTransport(hub, "emulated", rank, self.size, device)


def run_ranks(
    ranks: int | tuple[int, int],
    fn: Callable[[EmulatedMesh], T],
    device: str | torch.device = "cpu",
    timeout: float = 60.0,
) -> list[T]:
    """Run ``fn(mesh)`` on emulated ranks and return their results in the order of the ranks.

    A rank inherits the caller's grad mode and autocast, and runs its backward in its own thread. On the CPU the ranks
    share the caller's intra-op threads. Parameters that ranks share get their gradients added up by all of them; give
    each rank its own copy where that is not meant.

    Args:
        ranks: P, or (ring, ulysses).
        device: ``cpu``, or one GPU that all ranks share.
        timeout: seconds that a rank waits for another one.

    Raises:
        Whatever the first failing rank raised, with a note that names the rank; the others are stopped at their next
        transfer. RuntimeError: messages were left over that no rank received.
    """
    shape = ranks if isinstance(ranks, tuple) else (ranks, 1)
    if len(shape) != 2 or min(shape) < 1:
        raise ConfigError(f"run_ranks: {ranks} ranks; a count of at least 1 or a pair (ring, ulysses) works")
    place = torch.device(device)
    size = shape[0] * shape[1]
    hub = Hub(timeout)
    results: list[Any] = [None] * size
    failures: list[tuple[int, BaseException]] = []
    modes = _caller_modes(place)
    intra_op_threads = torch.get_num_threads()
    threads_per_rank = max(1, intra_op_threads // size)

    def work(rank: int) -> None:
        try:
            with ExitStack() as stack:
                torch.set_num_threads(threads_per_rank)
                if place.type == "cuda":
                    stack.enter_context(torch.cuda.device(place))
                for mode in modes:
                    stack.enter_context(mode())
                results[rank] = fn(EmulatedMesh(hub, rank, shape, place))
        except BaseException as error:
            failures.append((rank, error))  # list.append is atomic: the first failure stays first
            hub.abort()

    threads = [threading.Thread(target=work, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(size)]
    try:
        # The setting of the process too: threads that start later take it over.
        torch.set_num_threads(threads_per_rank)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        hub.abort()
        raise
    finally:
        torch.set_num_threads(intra_op_threads)
    for rank, error in failures:
        if not isinstance(error, Released):
            error.add_note(f"raised by emulated rank {rank} of {size}")
            raise error
    left_over = hub.unreceived()
    if left_over:
        raise RuntimeError("messages that no rank received: " + "; ".join(left_over))
    return results


def _caller_modes(device: torch.device) -> list[Callable[[], Any]]:
    """Context managers that put a new thread into the caller's modes, which torch keeps for each thread."""
    grad = torch.is_grad_enabled()
    modes: list[Callable[[], Any]] = [
        lambda: torch.autograd.set_multithreading_enabled(False),
        lambda: torch.set_grad_enabled(grad),
    ]
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        modes.append(lambda: torch.autocast(device.type, dtype=dtype))
    return modes


def _row(name: str, index: int, count: int) -> str:
    """A name for one of ``count`` groups along a dimension of the grid."""
    return f"emulated {name}" if count == 1 else f"emulated {name} {index}"


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _version(tensor: Tensor) -> int:
    """Counts the changes of a tensor's memory; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version
