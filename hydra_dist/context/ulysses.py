"""Ulysses: ranks exchange rows for heads, attend over all rows with some of the heads, and exchange back.

``rows_to_heads`` and ``heads_to_rows`` are operators of their own around attention, each with the other as its
backward. Where there are more ranks than key heads, several ranks have the same one, and its gradients from all of them
are added up in fp32 or wider, in the order of the ranks.

Source: Jacobs et al. 2023, "DeepSpeed Ulysses" (arXiv 2309.14509).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hydra_dist.context.handles import HANDLES, kept_alive
from hydra_dist.context.transport import Direction, Message, Transport


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
        sends = [(peer, _heads_of(x, peer, size)) for x in tensors for peer in range(size) if peer != rank]
        mine = [_heads_of(x, rank, size) for x in tensors]
        whole = [x.new_empty(x.shape[0], sum(self.lengths), *x.shape[2:]) for x in mine]
        places = [rows.split(self.lengths, 1) for rows in whole]
        receives = [(peer, rows[peer]) for rows in places for peer in range(size) if peer != rank]
        finish = self._begin(sends, receives, direction)
        for rows, own in zip(places, mine, strict=True):
            rows[rank].copy_(own)
        finish()
        return [_wide(rows) if size > x.shape[2] else rows for rows, x in zip(whole, tensors, strict=True)]

    def to_rows(self, tensors: Sequence[Tensor], num_heads: Sequence[int], direction: Direction) -> list[Tensor]:
        """The transpose: [B, S of the group, heads of this rank, D] -> [B, S_local, H, D]; copies of a head add up, in
        fp32 or wider, and stay so."""
        size, rank = self.transport.size, self.transport.rank
        parts = [(_wide(x) if size > H else x).split(self.lengths, 1) for x, H in zip(tensors, num_heads, strict=True)]
        came = [[torch.empty_like(rows[rank]) for _ in range(size)] for rows in parts]
        sends = [(peer, rows[peer]) for rows in parts for peer in range(size) if peer != rank]
        receives = [(peer, rows[peer]) for rows in came for peer in range(size) if peer != rank]
        self._begin(sends, receives, direction)()
        result = []
        for own, rows, H in zip(parts, came, num_heads, strict=True):
            rows[rank] = own[rank]
            copies = size // H
            if copies > 1:
                rows = [_added(rows[head * copies : (head + 1) * copies]) for head in range(H)]
            result.append(torch.cat(rows, 2))
        return result

    def _begin(self, sends: Sequence[Message], receives: Sequence[Message], direction: Direction) -> Callable[[], None]:
        """Start messages between the ranks, through contiguous copies where tensors are not; what is returned waits."""
        rooms = [
            x if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format) for _, x in receives
        ]
        arriving = [(peer, room) for (peer, _), room in zip(receives, rooms, strict=True)]
        leaving = [(peer, x.contiguous()) for peer, x in sends]
        work = self.transport.exchange(leaving, arriving, direction=direction, kind="heads")

        def finish() -> None:
            work.wait()
            for (_, x), room in zip(receives, rooms, strict=True):
                if room is not x:
                    x.copy_(room)

        return finish


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
