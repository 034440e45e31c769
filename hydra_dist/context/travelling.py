"""What goes around a ring: keys and values, or in the backward pass queries and what belongs to them.

Each says what a number of its rows is made of, which tensors leave a rank, what a rank computes with those that visit
it, and where their gradient goes when it comes home.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hydra_dist.attention import attend_tiles_backward
from hydra_dist.context.rotation import Shape, add_to_rows, rows_of
from hydra_dist.costs.needs import Rows
from hydra_dist.costs.tiles import Tile


class Keys:
    """Keys and values, [B, S_local, Hk, D] each, as one message."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    def shapes(self, num_rows: int) -> list[Shape]:
        return [_of_keys(self.k, num_rows)]

    def leaving(self, rows: Rows) -> list[Tensor]:
        """These rows; nothing where there are none."""
        return [torch.stack([rows_of(self.k, rows, 1), rows_of(self.v, rows, 1)]).contiguous()] if rows else []


class Local:
    """The rows of this rank in the backward pass, and the sums of their gradients in fp32 or wider."""

    def __init__(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> None:
        self.queries, self.keys, self.scale = (grad_out, q, out, lse), (k, v), scale
        self.grad_q, self.grad_k, self.grad_v = (x.new_zeros(x.shape, dtype=wide(x)) for x in (q, k, v))

    def add(
        self,
        tiles: Sequence[Tile],
        queries: Sequence[Tensor] | None = None,
        keys: Sequence[Tensor] | None = None,
        grad_q: Tensor | None = None,
        grad_keys: Tensor | None = None,
    ) -> None:
        """Add the gradients that come from ``tiles``, to local sums where no others are given; None: local rows."""
        grad_out, q, out, lse = self.queries if queries is None else queries
        k, v = self.keys if keys is None else keys
        grad_k, grad_v = (self.grad_k, self.grad_v) if grad_keys is None else grad_keys
        attend_tiles_backward(
            grad_out,
            q,
            k,
            v,
            out,
            lse,
            tiles,
            scale=self.scale,
            grad_q=self.grad_q if grad_q is None else grad_q,
            grad_k=grad_k,
            grad_v=grad_v,
        )

    def gradients(self, key_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Of q in its dtype, and of k and v in ``key_dtype``."""
        _, q, _, _ = self.queries
        return self.grad_q.to(q.dtype), self.grad_k.to(key_dtype), self.grad_v.to(key_dtype)


class KeysAround(Keys):
    """Keys and values visit other ranks' queries; the gradients of both follow as one message."""

    kind, sums_kind = "keys", "key gradients"

    def __init__(self, local: Local) -> None:
        super().__init__(*local.keys)
        self.local = local

    def sum_shape(self, num_rows: int) -> Shape:
        return _of_keys(self.local.grad_k, num_rows)

    def add(self, visitor: Sequence[Tensor], tiles: Sequence[Tile], added: Tensor) -> None:
        """What visiting keys add to the gradient of local queries, and to their own."""
        self.local.add(tiles, keys=visitor[0].unbind(), grad_keys=added)

    def come_home(self, rows: Rows, came: Tensor) -> None:
        for total, part in zip((self.local.grad_k, self.local.grad_v), came, strict=True):
            add_to_rows(total, rows, part, 1)


class QueriesAround:
    """Queries, the gradient of their output, their output and its lse visit other ranks' keys; their gradient follows.

    The first three are one message, lse is another.
    """

    kind, sums_kind = "queries", "query gradients"

    def __init__(self, local: Local) -> None:
        self.local = local

    def shapes(self, num_rows: int) -> list[Shape]:
        _, q, _, lse = self.local.queries
        B, _, Hq, D = q.shape
        return [((3, B, num_rows, Hq, D), q.dtype), ((B, Hq, num_rows), lse.dtype)]

    def sum_shape(self, num_rows: int) -> Shape:
        grad_q = self.local.grad_q
        return (grad_q.shape[0], num_rows, *grad_q.shape[2:]), grad_q.dtype

    def leaving(self, rows: Rows) -> list[Tensor]:
        if not rows:
            return []
        grad_out, q, out, lse = self.local.queries
        stacked = torch.stack([rows_of(x.to(q.dtype), rows, 1) for x in (grad_out, q, out)]).contiguous()
        return [stacked, rows_of(lse, rows, 2).contiguous()]

    def add(self, visitor: Sequence[Tensor], tiles: Sequence[Tile], added: Tensor) -> None:
        """What visiting queries add to the gradients of local keys and values, and to their own."""
        rows, lse = visitor
        self.local.add(tiles, queries=(*rows.unbind(), lse), grad_q=added)

    def come_home(self, rows: Rows, came: Tensor) -> None:
        add_to_rows(self.local.grad_q, rows, came, 1)


def wide(x: Tensor) -> torch.dtype:
    """The dtype in which sums over ranks of such tensors are."""
    return torch.promote_types(x.dtype, torch.float32)


def _of_keys(k: Tensor, num_rows: int) -> Shape:
    B, _, Hk, D = k.shape
    return (2, B, num_rows, Hk, D), k.dtype
