"""Attention over some of the keys, added to a running result: the inner loop of one device and of every rank.

The running result of a query is ``out`` and ``lse`` over the keys so far, or sums that lead to them where a merge rule
says so, in fp32 or wider. Each tile is computed by a fused operator and merged into the rows that it covers. The
backward goes over the same tiles with the final ``out`` and ``lse``: these make each tile's probabilities the final
ones, so its gradients simply add up.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hydra_dist.attention.backends import Backend, choose
from hydra_dist.attention.band import Band
from hydra_dist.attention.launch import Launch, Need
from hydra_dist.attention.merge import LogSumExp, MergeRule
from hydra_dist.attention.probe import Where
from hydra_dist.costs.tiles import Tile

_GENERAL = LogSumExp()


@torch.no_grad()
def attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Sequence[Tile],
    *,
    scale: float,
    out: Tensor,
    lse: Tensor,
    backend: str = "auto",
    fresh: bool = False,
    rule: MergeRule = _GENERAL,
) -> None:
    """Add the attention of ``q`` over ``k`` and ``v``, restricted to ``tiles``, to a running result in place.

    Args:
        q: [B, Sq, Hq, D].
        k, v: [B, Sk, Hk, D]; Hq is a multiple of Hk.
        tiles: from ``hydra_dist.costs.tiles.tiles`` for the rows of q and k.
        scale: factor on the scores.
        out: [B, Sq, Hq, D], fp32 or wider; 0 before the first call.
        lse: [B, Hq, Sq], fp32 or wider; -inf before the first call (``rule.nothing`` for another rule).
        backend: ``auto`` or one of ``hydra_dist.attention.backends()``.
        fresh: ``out`` and ``lse`` are as before the first call. Spares a look at ``lse``; never needed.
        rule: how parts are merged, the same in all calls. With another one than the general ``LogSumExp``, ``out`` and
            ``lse`` come from ``rule.start`` and mean something to ``rule.finish`` only.

    Raises:
        ConfigError: an unknown backend, or one that does not take the device or dtype.
    """
    _check_accumulators(q, out=out, lse=lse)
    if not tiles or q.numel() == 0 or k.numel() == 0:
        return
    chosen = _chosen(backend, q, k, tiles)
    dtype = chosen.forward_dtype(q.device, q.dtype)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    seen = _Seen()
    for tile in tiles:
        batch, rows, keys = _slices(tile)
        part_out, part_lse = chosen.forward(q[batch, rows], k[batch, keys], v[batch, keys], _launch(tile, scale))
        running_out, running_lse = out[batch, rows], lse[batch, :, rows]
        untouched = seen.is_first(tile)
        if untouched and not fresh:
            # On the CPU a look at lse is cheap; on a GPU it would wait for the device, and merging is right anyway.
            untouched = not q.is_cuda and bool(running_lse.amax() == rule.nothing)
        if untouched:
            rule.put(running_out, running_lse, part_out, part_lse)
        else:
            rule.add(running_out, running_lse, part_out, part_lse, all_see_keys=True)  # so tiles are made


@torch.no_grad()
def attend_tiles_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: Sequence[Tile],
    *,
    scale: float,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    backend: str = "auto",
) -> None:
    """Add the gradients that come from ``tiles`` to running sums in place.

    Args:
        grad_out: [B, Sq, Hq, D], the gradient of the final ``out``.
        q, k, v, tiles, scale, backend: as in ``attend_tiles``.
        out, lse: [B, Sq, Hq, D] and [B, Hq, Sq], the final ones over all keys, not just those in ``k``. ``out`` may be
            in the dtype of q, or wider: small tiles in half precision then lose less.
        grad_q: [B, Sq, Hq, D], fp32 or wider.
        grad_k, grad_v: [B, Sk, Hk, D], fp32 or wider.
    """
    _check_accumulators(q, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v)
    if not tiles or q.numel() == 0 or k.numel() == 0:
        return
    chosen = _chosen(backend, q, k, tiles)
    dtype = chosen.backward_dtype(q.device, q.dtype)
    grad_out, q, k, v = grad_out.to(dtype), q.to(dtype), k.to(dtype), v.to(dtype)
    lse = lse.to(torch.promote_types(dtype, torch.float32))
    for tile in tiles:
        batch, rows, keys = _slices(tile)
        part_q, part_k, part_v = chosen.backward(
            grad_out[batch, rows],
            q[batch, rows],
            k[batch, keys],
            v[batch, keys],
            out[batch, rows],
            lse[batch, :, rows],
            _launch(tile, scale),
        )
        grad_q[batch, rows].add_(part_q)
        grad_k[batch, keys].add_(part_k)
        grad_v[batch, keys].add_(part_v)


class _Seen:
    """Which rows tiles have covered so far. Exact for tiles that are sorted by row, never too optimistic otherwise."""

    def __init__(self) -> None:
        self._stop: dict[int | None, int] = {}

    def is_first(self, tile: Tile) -> bool:
        """Whether no tile before this one covered any of its rows."""
        stops = self._stop
        reached = (
            max(stops.values(), default=0) if tile.batch is None else max(stops.get(tile.batch, 0), stops.get(None, 0))
        )
        stops[tile.batch] = max(stops.get(tile.batch, 0), tile.q_stop)
        return tile.q_start >= reached


def _slices(tile: Tile) -> tuple[slice, slice, slice]:
    batch = slice(None) if tile.batch is None else slice(tile.batch, tile.batch + 1)
    return batch, slice(tile.q_start, tile.q_stop), slice(tile.k_start, tile.k_stop)


def _chosen(backend: str, q: Tensor, k: Tensor, tiles: Sequence[Tile]) -> Backend:
    where = Where(q.device, q.dtype, q.shape[3], q.shape[2] // k.shape[2])
    return choose(backend, where, Need(None, edges=any(tile.kind == "masked" for tile in tiles))).backend


def _launch(tile: Tile, scale: float) -> Launch:
    if tile.kind != "masked":
        return Launch(scale, causal=tile.kind == "causal")
    rows, keys = tile.q_stop - tile.q_start, tile.k_stop - tile.k_start
    return Launch(scale, band=Band(rows, keys, tile.offset, tile.window))


def _check_accumulators(q: Tensor, **sums: Tensor) -> None:
    for name, tensor in sums.items():
        if tensor.dtype.itemsize < 4:
            raise ValueError(f"{name} is {tensor.dtype}: running results are added up in fp32 or wider")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} and q on {q.device}")
