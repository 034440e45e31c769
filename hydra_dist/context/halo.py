"""The halo: the rows before each local chunk, which a causal convolution or a value shift reads.

Under any layout a chunk's predecessor is held by another rank, or by this one elsewhere. The rows of all tensors that
are asked for go in one message to each peer. The backward pass sends the gradients along the same ways back, and adds
them to the rows they came from.

A halo belongs to the chunk's first row: what lies outside of that row's document, or before the sequence, reads as zero
and receives no gradient. (A convolution masks again where a later document begins within its reach.)
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hydra_dist.context.geometry import HaloMap
from hydra_dist.context.handles import HANDLES, kept_alive
from hydra_dist.context.transport import Direction, Transport


class HaloExchange:
    """Halos of some tensors over the ranks of one group.

    Args:
        transport: to the ranks that share the sequence.
        maps: which rows go where, for each tensor.
        inside: for each tensor [B, chunks, rows] bool, the slots that lie in the document of the chunk's first row;
            None where all of them do.
    """

    def __init__(self, transport: Transport, maps: Sequence[HaloMap], inside: Sequence[Tensor | None]) -> None:
        self.transport = transport
        self.maps = maps
        self.inside = inside

    def gather(self, tensors: Sequence[Tensor], num_chunks: int) -> list[Tensor]:
        """[B, S_local, C] -> [B, chunks, rows, C] for each tensor."""
        return self.begin_gather(tensors, num_chunks)()

    def begin_gather(self, tensors: Sequence[Tensor], num_chunks: int) -> Callable[[], list[Tensor]]:
        """Send what other ranks need, and return what waits for the halos and gives them."""
        rows = [x.index_select(1, halo_map.touched) for x, halo_map in zip(tensors, self.maps, strict=True)]
        takes = [halo_map.take for halo_map in self.maps]
        received = self._begin(rows, [halo_map.give for halo_map in self.maps], takes, "forward")

        def finish() -> list[Tensor]:
            came = received()
            halos = []
            for index, (x, halo_map) in enumerate(zip(rows, self.maps, strict=True)):
                slots = x.new_zeros(x.shape[0], num_chunks * halo_map.rows, x.shape[2])
                for peer in sorted(takes[index]):
                    slots.index_copy_(1, takes[index][peer], came[peer][index])
                halo = slots.view(x.shape[0], num_chunks, halo_map.rows, x.shape[2])
                inside = self.inside[index]
                halos.append(halo if inside is None else halo.masked_fill_(~inside.unsqueeze(-1), 0))
            return halos

        return finish

    def scatter_add(self, grads: Sequence[Tensor], local_length: int) -> list[Tensor]:
        """The transpose: [B, chunks, rows, C] -> [B, S_local, C], where a row of several halos gets their sum."""
        sums = []
        for grad, (rows, touched) in zip(grads, self.begin_scatter(grads)(), strict=True):
            whole = grad.new_zeros(grad.shape[0], local_length, grad.shape[3])
            sums.append(whole.index_copy_(1, rows, touched.to(grad.dtype)))
        return sums

    def begin_scatter(self, grads: Sequence[Tensor]) -> Callable[[], list[tuple[Tensor, Tensor]]]:
        """Send gradients of halos home, and return what waits for those of this rank's rows: for each tensor the rows
        [n] that some halo has, and the sums [B, n, C] over these halos in fp32 or wider."""
        slots = []
        for grad, inside in zip(grads, self.inside, strict=True):
            masked = grad if inside is None else grad.masked_fill(~inside.unsqueeze(-1), 0)
            slots.append(masked.reshape(grad.shape[0], -1, grad.shape[3]))
        takes = [halo_map.give for halo_map in self.maps]
        received = self._begin(slots, [halo_map.take for halo_map in self.maps], takes, "backward")

        def finish() -> list[tuple[Tensor, Tensor]]:
            came = received()
            sums = []
            for index, (grad, halo_map) in enumerate(zip(slots, self.maps, strict=True)):
                shape = (grad.shape[0], halo_map.touched.numel(), grad.shape[2])
                touched = grad.new_zeros(shape, dtype=torch.promote_types(grad.dtype, torch.float32))
                for peer in sorted(takes[index]):
                    touched.index_add_(1, takes[index][peer], came[peer][index].to(touched.dtype))
                sums.append((halo_map.touched, touched))
            return sums

        return finish

    def _begin(
        self,
        rows: Sequence[Tensor],
        gives: Sequence[dict[int, Tensor]],
        takes: Sequence[dict[int, Tensor]],
        direction: Direction,
    ) -> Callable[[], dict[int, dict[int, Tensor]]]:
        """Send rows[i][:, gives[i][peer]] of every tensor i to each peer. What is returned waits, and gives
        [peer][i], this rank's own rows among them."""
        rank = self.transport.rank
        # Wide elements come first, so that each part of a message lies at a multiple of its element size.
        order = sorted(range(len(rows)), key=lambda index: -rows[index].element_size())
        received: dict[int, dict[int, Tensor]] = {}
        sends, receives, parts = [], [], []
        for peer in sorted({peer for give in gives for peer in give}):
            part = {i: rows[i].index_select(1, gives[i][peer]) for i in order if peer in gives[i]}
            if peer == rank:
                received[rank] = part
            else:
                sends.append((peer, torch.cat([_as_bytes(piece) for piece in part.values()])))
        for peer in sorted({peer for take in takes for peer in take} - {rank}):
            present = [i for i in order if peer in takes[i]]
            shapes = {i: (rows[i].shape[0], takes[i][peer].numel(), rows[i].shape[2]) for i in present}
            sizes = [math.prod(shapes[i]) * rows[i].element_size() for i in present]
            message = rows[0].new_empty(sum(sizes), dtype=torch.uint8)
            receives.append((peer, message))
            parts.append((peer, shapes, message.split(sizes)))
        work = self.transport.exchange(sends, receives, direction=direction, kind="halo")

        def wait() -> dict[int, dict[int, Tensor]]:
            work.wait()
            for peer, shapes, pieces in parts:
                received[peer] = {
                    i: piece.view(rows[i].dtype).view(shapes[i]) for i, piece in zip(shapes, pieces, strict=True)
                }
            return received

        return wait


@torch.library.custom_op("hydra_dist::halo", mutates_args=())
def halo(tensors: list[Tensor], handle: int, rows: list[int], num_chunks: int) -> list[Tensor]:
    """``HaloExchange.gather`` of the plan that ``handle`` names; its backward is the transpose.

    Args:
        tensors: each [B, S_local, C].
        rows: of each tensor, before each of the ``num_chunks`` local chunks.

    Returns:
        For each tensor [B, chunks, rows, C].
    """
    return halo_exchange(handle, rows, tensors[0].device).gather(tensors, num_chunks)


@halo.register_fake
def _halo_fake(tensors: list[Tensor], handle: int, rows: list[int], num_chunks: int) -> list[Tensor]:
    pairs = zip(tensors, rows, strict=True)
    return [x.new_empty(x.shape[0], num_chunks, number, x.shape[2]) for x, number in pairs]


@torch.library.custom_op("hydra_dist::halo_backward", mutates_args=())
def halo_backward(grads: list[Tensor], handle: int, rows: list[int], local_length: int) -> list[Tensor]:
    """``HaloExchange.scatter_add``: for each [B, chunks, rows, C] the gradient [B, S_local, C]."""
    return halo_exchange(handle, rows, grads[0].device).scatter_add(grads, local_length)


@halo_backward.register_fake
def _halo_backward_fake(grads: list[Tensor], handle: int, rows: list[int], local_length: int) -> list[Tensor]:
    return [grad.new_empty(grad.shape[0], local_length, grad.shape[3]) for grad in grads]


def halo_exchange(handle: int, rows: Sequence[int], device: torch.device) -> HaloExchange:
    """The exchange of the plan that ``handle`` names, for tensors with these numbers of rows before each chunk."""
    exchange: HaloExchange = HANDLES.get(handle).halo_exchange(rows, device)
    return exchange


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, handle, rows, _ = inputs
    ctx.plan = kept_alive(handle)
    ctx.plain = (handle, rows, tensors[0].shape[1])
    ctx.like = [(x.shape, x.dtype, x.device) for x in output]


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    # A halo that nothing depends on is sent as zeros: the other ranks wait for it.
    whole = [
        torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
        for grad, (shape, dtype, device) in zip(grads, ctx.like, strict=True)
    ]
    sums = torch.ops.hydra_dist.halo_backward(whole, *ctx.plain)
    return list(sums), None, None, None


def _refuse_second_derivative(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError("the halo exchange has no second derivative: differentiate once, without create_graph=True")


halo.register_autograd(_backward, setup_context=_setup_context)
halo_backward.register_autograd(_refuse_second_derivative, setup_context=lambda ctx, inputs, output: None)


def _as_bytes(piece: Tensor) -> Tensor:
    return piece.contiguous().view(torch.uint8).reshape(-1)
