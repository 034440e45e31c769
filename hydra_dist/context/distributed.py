"""The transport between processes: torch.distributed over gloo or NCCL.

The group passed in is used for nothing else. Point-to-point messages and the collectives of ZeRO would otherwise wait
for each other in an order that no rank controls.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from hydra_dist.context.transport import Finished, Message, Transport, TransportTimeoutError, Work
from hydra_dist.errors import RunError


def _collective(newer: str, older: str) -> Callable[..., Any]:
    """torch 2.13 renamed the collectives on one tensor; 2.11 knows only the older names."""
    return getattr(dist, newer) if hasattr(dist, newer) else getattr(dist, older)


_all_gather = _collective("all_gather_single", "all_gather_into_tensor")
_reduce_scatter = _collective("reduce_scatter_single", "reduce_scatter_tensor")


class DistributedTransport(Transport):
    """One rank of a process group.

    Args:
        group: a communicator of its own. Every rank of it builds its transport at the same point of the program.
        device: where the tensors live: a CPU for gloo, this rank's GPU for NCCL.
        timeout: seconds that ``wait`` waits for a peer; None takes the group's own limit. NCCL keeps to the group's
            limit, which its watchdog enforces, because its ``wait`` does not block the host.
    """

    def __init__(self, group: ProcessGroup, device: torch.device, timeout: float | None = None) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group), device)
        self.group = group
        self.timeout = None if timeout is None or device.type != "cpu" else timedelta(seconds=timeout)
        self.global_ranks = [dist.get_global_rank(group, rank) for rank in range(self.size)]
        if device.type == "cuda":
            # NCCL sets up a communicator at its first call, which all ranks must make; an exchange may have no part
            # for some of them.
            dist.all_reduce(torch.zeros(1, device=device), group=group)

    def _exchange(self, sends: list[Message], receives: list[Message], label: str) -> Work:
        operations = [
            dist.P2POp(operation, _wire(tensor), self.global_ranks[peer], self.group)
            for operation, messages in ((dist.isend, sends), (dist.irecv, receives))
            for peer, tensor in messages
        ]
        peers = sorted({peer for peer, _ in (*sends, *receives)})
        keep = [tensor for _, tensor in (*sends, *receives)]
        return self._work(dist.batch_isend_irecv(operations), label, peers, keep)

    def _all_to_all(self, outputs: list[Tensor], inputs: list[Tensor], label: str) -> Work:
        sent = torch.cat([_wire(tensor).flatten() for tensor in inputs])
        received = sent.new_empty(sum(_wire(tensor).numel() for tensor in outputs))
        splits = [_wire(tensor).numel() for tensor in outputs]
        work = dist.all_to_all_single(
            received, sent, splits, [_wire(tensor).numel() for tensor in inputs], group=self.group, async_op=True
        )
        return self._work([work], label, None, [sent], lambda: _fill(outputs, received.split(splits)))

    def _all_gather(self, outputs: list[Tensor], tensor: Tensor, label: str) -> Work:
        longest = max(output.numel() for output in outputs)
        sent = _padded(_wire(tensor), longest)
        received = sent.new_empty(self.size * longest)
        work = _all_gather(received, sent, group=self.group, async_op=True)
        return self._work([work], label, None, [sent], lambda: _fill(outputs, received.split(longest)))

    def _reduce_scatter(self, output: Tensor, inputs: list[Tensor], label: str) -> Work:
        longest = max(tensor.numel() for tensor in inputs)
        sent = torch.cat([_padded(tensor, longest) for tensor in inputs])
        received = sent.new_empty(longest)
        work = _reduce_scatter(received, sent, group=self.group, async_op=True)
        return self._work([work], label, None, [sent], lambda: _fill([output], [received]))

    def _all_reduce(self, tensor: Tensor, label: str) -> Work:
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        return self._work([work], label, None, [tensor])

    def _work(
        self,
        works: Sequence[Any],
        label: str,
        peers: Sequence[int] | None,
        keep: list[Tensor],
        finish: Callable[[], None] | None = None,
    ) -> Work:
        if peers is None:
            peers = [rank for rank in range(self.size) if rank != self.rank]
        works = [work for work in works if work is not None]
        if not works and finish is None:
            return Finished()
        return _DistributedWork(self, works, label, peers, keep, finish)


class _DistributedWork(Work):
    """Holds on to the tensors until the transfer is over."""

    def __init__(
        self,
        transport: DistributedTransport,
        works: Sequence[Any],
        label: str,
        peers: Sequence[int],
        keep: list[Tensor],
        finish: Callable[[], None] | None,
    ) -> None:
        self.transport, self.works, self.label, self.peers = transport, works, label, peers
        self.keep, self.finish = keep, finish

    def wait(self) -> None:
        timeout = self.transport.timeout
        for work in self.works:
            try:
                work.wait() if timeout is None else work.wait(timeout)
            except RuntimeError as error:
                raise self._explained(error) from error
        if self.finish is not None:
            self.finish()
        self.works, self.keep, self.finish = [], [], None

    def _explained(self, error: RuntimeError) -> RunError:
        transport = self.transport
        me = f"context rank {transport.rank} of {transport.size} (global rank {transport.global_ranks[transport.rank]})"
        peers = ", ".join(f"{peer} (global rank {transport.global_ranks[peer]})" for peer in self.peers)
        message = f"{me}: {self.label} with context rank {peers} failed: {error}"
        return TransportTimeoutError(message) if "timed out" in str(error).lower() else RunError(message)


def _wire(tensor: Tensor) -> Tensor:
    """Bytes for the dtypes that a backend may not know (FP8, bool), the tensor itself otherwise."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def _padded(tensor: Tensor, length: int) -> Tensor:
    flat = tensor.reshape(-1)
    return flat if flat.numel() == length else torch.cat([flat, flat.new_zeros(length - flat.numel())])


def _fill(outputs: Sequence[Tensor], received: Sequence[Tensor]) -> None:
    """Copy what was received, which may be longer by padding."""
    for output, flat in zip(outputs, received, strict=True):
        wire = _wire(output)
        wire.copy_(flat[: wire.numel()].view(wire.shape))
