"""Ulysses: ranks exchange rows for heads, attend over all rows with some of the heads, and exchange back.

``rows_to_heads`` and ``heads_to_rows`` are operators of their own around attention, each with the other as its
backward. Where there are more ranks than key heads, several ranks have the same one, and its gradients from all of them
are added up in fp32 or wider, in the order of the ranks.

Source: Jacobs et al. 2023, "DeepSpeed Ulysses" (arXiv 2309.14509).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hydra_dist.context.handles import HANDLES, kept_alive
from hydra_dist.context.transport import Direction, Transport


class HeadExchange:
    """The exchange between the ranks of one Ulysses group.

    Args:
        transport: to these ranks.
        lengths: rows of each of them; together, in their order, the rows that attention is over.
    """

    def __init__(self, transport: Transport, lengths: Sequence[int]) -> None:
        self.transport = transport
        self.lengths = list(lengths)

    def to_heads(self, tensors: Sequence[Tensor], direction: Direction) -> list[Tensor]:
        """[B, S_local, H, D] -> [B, S of the group, heads of this rank, D] for each tensor, in one exchange.

        Heads that several ranks have come out in fp32 or wider, so that the gradients of their copies do too: they are
        parts of a sum.
        """
        size, rank = self.transport.size, self.transport.rank
        sends = [[_heads_of(x, peer, size) for x in tensors] for peer in range(size)]
        mine = [(x.shape[0], x[:, :, _dealt(x.shape[2], rank, size)].shape[2], x.shape[3]) for x in tensors]
        shapes = [[(B, rows, heads, D) for B, heads, D in mine] for rows in self.lengths]
        received = self._exchange(sends, shapes, tensors, direction)
        whole = (torch.cat([parts[index] for parts in received], 1) for index in range(len(tensors)))
        return [_wide(rows) if size > x.shape[2] else rows for rows, x in zip(whole, tensors, strict=True)]

    def to_rows(self, tensors: Sequence[Tensor], num_heads: Sequence[int], direction: Direction) -> list[Tensor]:
        """The transpose: [B, S of the group, heads of this rank, D] -> [B, S_local, H, D]; copies of a head add up, in
        fp32 or wider, and stay so."""
        size, rank = self.transport.size, self.transport.rank
        own = self.lengths[rank]
        wide = [_wide(x) if size > H else x for x, H in zip(tensors, num_heads, strict=True)]
        sends = [list(parts) for parts in zip(*(x.split(self.lengths, 1) for x in wide), strict=True)]
        shapes = [[(x.shape[0], own, x.shape[2], x.shape[3]) for x in wide]] * size
        received = self._exchange(sends, shapes, wide, direction)
        result = []
        for index, H in enumerate(num_heads):
            parts = [came[index] for came in received]
            if size > H:
                copies = size // H
                parts = [_added(parts[head * copies : (head + 1) * copies]) for head in range(H)]
            result.append(torch.cat(parts, 2))
        return result

    def _exchange(
        self,
        sends: Sequence[Sequence[Tensor]],
        shapes: Sequence[Sequence[tuple[int, ...]]],
        like: Sequence[Tensor],
        direction: Direction,
    ) -> list[list[Tensor]]:
        """sends[p] go to rank p; what comes from rank p has ``shapes[p]``. As bytes, so that dtypes may differ."""
        # Wide elements come first, so that each part of a message lies at a multiple of its element size.
        order = sorted(range(len(like)), key=lambda index: -like[index].element_size())
        packed = [torch.cat([_as_bytes(parts[index]) for index in order]) for parts in sends]
        sizes = [[torch.Size(shape[index]).numel() * like[index].element_size() for index in order] for shape in shapes]
        flat = [torch.empty(sum(size), dtype=torch.uint8, device=self.transport.device) for size in sizes]
        self.transport.all_to_all(flat, packed, direction=direction, kind="heads").wait()
        received = []
        for message, shape, size in zip(flat, shapes, sizes, strict=True):
            pieces = dict(zip(order, message.split(size), strict=True))
            received.append([pieces[i].view(x.dtype).view(shape[i]) for i, x in enumerate(like)])
        return received


def _dealt(num_heads: int, rank: int, size: int) -> slice:
    """The heads that a rank works on; one that others have too, where there are fewer heads than ranks."""
    if num_heads < size:
        head = rank * num_heads // size
        return slice(head, head + 1)
    width = num_heads // size
    return slice(rank * width, (rank + 1) * width)


def _heads_of(x: Tensor, rank: int, size: int) -> Tensor:
    return x[:, :, _dealt(x.shape[2], rank, size)]


def _added(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _as_bytes(piece: Tensor) -> Tensor:
    return piece.contiguous().view(torch.uint8).reshape(-1)


@torch.library.custom_op("hydra_dist::rows_to_heads", mutates_args=())
def rows_to_heads(tensors: list[Tensor], handle: int, num_rows: int, num_ranks: int, backward: bool) -> list[Tensor]:
    """``HeadExchange.to_heads`` of the plan that ``handle`` names.

    Args:
        tensors: each [B, S_local, H, D].
        num_rows, num_ranks: of the group.
        backward: counted as traffic of the backward pass.

    Returns:
        For each tensor [B, num_rows, H / num_ranks or 1, D]; in fp32 or wider where H < num_ranks.
    """
    return _exchange(handle).to_heads(tensors, "backward" if backward else "forward")


@rows_to_heads.register_fake
def _rows_to_heads_fake(
    tensors: list[Tensor], handle: int, num_rows: int, num_ranks: int, backward: bool
) -> list[Tensor]:
    return [
        x.new_empty(
            (x.shape[0], num_rows, max(1, x.shape[2] // num_ranks), x.shape[3]),
            dtype=torch.promote_types(x.dtype, torch.float32) if num_ranks > x.shape[2] else x.dtype,
        )
        for x in tensors
    ]


@torch.library.custom_op("hydra_dist::heads_to_rows", mutates_args=())
def heads_to_rows(
    tensors: list[Tensor], handle: int, num_heads: list[int], local_length: int, backward: bool
) -> list[Tensor]:
    """``HeadExchange.to_rows``: for each [B, rows of the group, heads of this rank, D] all H heads of local rows.

    In a backward pass, with ``num_heads`` below the number of ranks, the sums of copies in fp32 or wider.
    """
    return _exchange(handle).to_rows(tensors, num_heads, "backward" if backward else "forward")


@heads_to_rows.register_fake
def _heads_to_rows_fake(
    tensors: list[Tensor], handle: int, num_heads: list[int], local_length: int, backward: bool
) -> list[Tensor]:
    return [x.new_empty(x.shape[0], local_length, H, x.shape[3]) for x, H in zip(tensors, num_heads, strict=True)]


def _exchange(handle: int) -> HeadExchange:
    exchange: HeadExchange = HANDLES.get(handle).heads
    return exchange


def _setup_to_heads(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, handle, _, _, backward = inputs
    ctx.plan = kept_alive(handle)
    ctx.plain = (handle, [x.shape[2] for x in tensors], tensors[0].shape[1], not backward)
    ctx.like = [(x.shape, x.dtype, x.device) for x in output]
    ctx.dtypes = [x.dtype for x in tensors]


def _to_heads_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    found = torch.ops.hydra_dist.heads_to_rows(_whole(ctx, grads), *ctx.plain)
    return [x.to(dtype) for x, dtype in zip(found, ctx.dtypes, strict=True)], None, None, None, None


def _setup_to_rows(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, handle, num_heads, _, backward = inputs
    ctx.plan = kept_alive(handle)
    num_ranks = num_heads[0] // tensors[0].shape[2]
    ctx.plain = (handle, tensors[0].shape[1], num_ranks, not backward)
    ctx.like = [(x.shape, x.dtype, x.device) for x in output]


def _to_rows_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    found = torch.ops.hydra_dist.rows_to_heads(_whole(ctx, grads), *ctx.plain)
    return list(found), None, None, None, None


def _whole(ctx: Any, grads: list[Tensor | None]) -> list[Tensor]:
    """Zeros where nothing depends on a tensor: the other ranks wait for it."""
    return [
        torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
        for grad, (shape, dtype, device) in zip(grads, ctx.like, strict=True)
    ]


rows_to_heads.register_autograd(_to_heads_backward, setup_context=_setup_to_heads)
heads_to_rows.register_autograd(_to_rows_backward, setup_context=_setup_to_rows)
