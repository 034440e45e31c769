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
        through_host: move what is sent and received through host memory. None: where the tensors are on a GPU and the
            group is gloo's, which sends between hosts only (several ranks that share one GPU).
    """

    def __init__(
        self,
        group: ProcessGroup,
        device: torch.device,
        timeout: float | None = None,
        through_host: bool | None = None,
    ) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group), device)
        self.group = group
        if through_host is None:
            through_host = device.type == "cuda" and dist.get_backend(group) == "gloo"
        self.through_host = through_host
        self.timeout = None if timeout is None or device.type != "cpu" else timedelta(seconds=timeout)
        self.global_ranks = [dist.get_global_rank(group, rank) for rank in range(self.size)]
        if device.type == "cuda" and not through_host:
            # NCCL sets up a communicator at its first call, which all ranks must make; an exchange may have no part
            # for some of them.
            dist.all_reduce(torch.zeros(1, device=device), group=group)

    def _exchange(self, sends: list[Message], receives: list[Message], label: str) -> Work:
        outgoing = [self._outgoing(tensor) for _, tensor in sends]
        incoming = [self._incoming(tensor) for _, tensor in receives]
        peers = [self.global_ranks[peer] for peer, _ in (*sends, *receives)]
        kinds = [dist.isend] * len(sends) + [dist.irecv] * len(receives)
        operations = [
            dist.P2POp(kind, tensor, peer, self.group)
            for kind, tensor, peer in zip(kinds, (*outgoing, *incoming), peers, strict=True)
        ]
        finish = (lambda: _fill([tensor for _, tensor in receives], incoming)) if self.through_host else None
        named = sorted({peer for peer, _ in (*sends, *receives)})
        keep = [*outgoing, *incoming, *(tensor for _, tensor in (*sends, *receives))]
        return self._work(dist.batch_isend_irecv(operations), label, named, keep, finish)

    def _all_to_all(self, outputs: list[Tensor], inputs: list[Tensor], label: str) -> Work:
        sent = self._outgoing(torch.cat([_wire(tensor).flatten() for tensor in inputs]))
        received = sent.new_empty(sum(_wire(tensor).numel() for tensor in outputs))
        splits = [_wire(tensor).numel() for tensor in outputs]
        work = dist.all_to_all_single(
            received, sent, splits, [_wire(tensor).numel() for tensor in inputs], group=self.group, async_op=True
        )
        return self._work([work], label, None, [sent], lambda: _fill(outputs, received.split(splits)))

    def _all_gather(self, outputs: list[Tensor], tensor: Tensor, label: str) -> Work:
        longest = max(output.numel() for output in outputs)
        sent = self._outgoing(_padded(_wire(tensor), longest))
        received = sent.new_empty(self.size * longest)
        work = _all_gather(received, sent, group=self.group, async_op=True)
        return self._work([work], label, None, [sent], lambda: _fill(outputs, received.split(longest)))

    def _reduce_scatter(self, output: Tensor, inputs: list[Tensor], label: str) -> Work:
        longest = max(tensor.numel() for tensor in inputs)
        sent = self._outgoing(torch.cat([_padded(tensor, longest) for tensor in inputs]))
        received = sent.new_empty(longest)
        work = _reduce_scatter(received, sent, group=self.group, async_op=True)
        return self._work([work], label, None, [sent], lambda: _fill([output], [received]))

    def _all_reduce(self, tensor: Tensor, label: str) -> Work:
        total = self._outgoing(tensor)
        work = dist.all_reduce(total, group=self.group, async_op=True)
        finish = (lambda: _fill([tensor], [total])) if self.through_host else None
        return self._work([work], label, None, [tensor, total], finish)

    def _outgoing(self, tensor: Tensor) -> Tensor:
        """What is handed to the process group in the place of a tensor that is sent."""
        wire = _wire(tensor)
        return wire.to("cpu", copy=True) if self.through_host else wire

    def _incoming(self, tensor: Tensor) -> Tensor:
        """What the process group fills in the place of a tensor that is received."""
        wire = _wire(tensor)
        return torch.empty_like(wire, device="cpu") if self.through_host else wire

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
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            return TransportTimeoutError(f"{message} (context.timeout_seconds is how long a rank waits)")
        return RunError(message)


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
        wire.copy_(flat.reshape(-1)[: wire.numel()].view(wire.shape))
