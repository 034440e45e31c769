"""Softmax attention over any mask of positions and documents: a fused forward that never keeps the score matrix.

One program computes a block of queries of one head. It walks over the blocks of keys that some of its queries may see,
with a running maximum and a running sum of each row's exponentials; query heads that share a key head read it where it
lies. Exponentials are powers of two, with the scale and log2(e) folded into one factor.

Source: Dao 2023 (arXiv 2307.08691), algorithm 1; Milakov and Gimelshein 2018 (arXiv 1805.02867), algorithm 3.
"""
# mypy: allow-untyped-defs

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydra_dist.kernels.attention_blocks import allowed, load_rows, next_runs, row_positions, row_starts
from hydra_dist.kernels.attention_launch import (
    MaskArguments,
    Tile,
    TileTable,
    check_inputs,
    example,
    is_routine,
    mask_arguments,
    positive_scale,
    strides,
    tile_for,
    unit_stride,
    variants,
)
from hydra_dist.kernels.specialization import Specialization, of_launch

TILES: TileTable = {
    # (largest head_dim, fp32 inputs): chip: queries, keys, warps, stages
    (64, False): {"sm_80": Tile(128, 64, 8, 3), "sm_90": Tile(128, 128, 8, 3), "sm_100": Tile(128, 64, 8, 3)},
    (128, False): {"sm_80": Tile(128, 32, 8, 3), "sm_90": Tile(128, 64, 8, 2), "sm_100": Tile(128, 32, 8, 3)},
    (256, False): {"sm_80": Tile(64, 32, 8, 2), "sm_90": Tile(64, 32, 8, 2), "sm_100": Tile(64, 16, 8, 2)},
    (64, True): {"sm_80": Tile(16, 32, 4, 1), "sm_90": Tile(16, 32, 4, 1), "sm_100": Tile(16, 32, 4, 1)},
    (128, True): {"sm_80": Tile(32, 32, 8, 2), "sm_90": Tile(32, 32, 8, 2), "sm_100": Tile(32, 32, 8, 2)},
}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    document_starts: Tensor | None = None,
    k_document_starts: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    accumulate: tuple[Tensor, Tensor] | None = None,
    tile: Tile | None = None,
    visits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the keys that the mask allows.

    Args:
        q: [B, Sq, Hq, D] in fp32, fp16 or bf16, with any strides; D up to 256, in fp32 up to 128.
        k, v: [B, Sk, Hk, D]; Hq is a multiple of Hk, and query heads h*Hq/Hk and on share key head h.
        scale: factor on the scores.
        causal, window, q_positions, k_positions, document_starts, k_document_starts: as those of
            ``hydra_dist.attention.Mask``.
        out_dtype: of ``out``; None: that of q. torch.float32 leaves it unrounded.
        accumulate: ``out`` [B, Sq, Hq, D] and ``lse`` [B, Hq, Sq], fp32 and contiguous: the result over other keys,
            which this one is added to in place. 0 and -inf where there are none yet.
        tile: other blocks than the table's.
        visits: int32 [B, Hq, query blocks], receives how many blocks of keys each program visited.

    Returns:
        out [B, Sq, Hq, D] and lse [B, Hq, Sq] in fp32; those of ``accumulate`` where it is given. A query that sees no
        key has out 0 and lse -inf.

    Raises:
        ValueError: inputs or a device that the kernel cannot take.
    """
    check_inputs(q, k, v)
    if accumulate is None:
        out = torch.empty(q.shape, dtype=out_dtype or q.dtype, device=q.device)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    else:
        out, lse = accumulate
        _check_running(q, out, lse)
    if q.numel() == 0 or k.numel() == 0:
        return (out.zero_(), lse.fill_(-torch.inf)) if accumulate is None else (out, lse)
    tile = tile or tile_for(TILES, q)
    q, scale = positive_scale(q, scale)
    mask = MaskArguments(causal, window, q_positions, k_positions, document_starts, k_document_starts)
    arguments = _arguments(q, k, v, out, lse, scale, mask, accumulate is not None, visits, tile)
    grid = (triton.cdiv(q.shape[1], tile.queries), q.shape[0] * q.shape[2])
    _kernel[grid](**arguments, num_warps=tile.num_warps, num_stages=tile.num_stages)
    return out, lse


def specializations() -> list[Specialization]:
    """See ``variants``. With a general mask, the result is added to a running one."""
    return [_specialization(*variant) for variant in variants(TILES)]


def _specialization(dtype: torch.dtype, head_dim: int, chip: str, tile: Tile, general: bool) -> Specialization:
    name, q, k, lse, mask = example(dtype, head_dim, general)
    out = q.float() if general else q
    return of_launch(
        f"forward {name}",
        _kernel,
        _arguments(q, k, k, out, lse, 0.125, mask, general, None, tile),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        tensor_cores=dtype != torch.float32,
        chips=(chip,),
        routine=is_routine(dtype, head_dim, chip, general),
    )


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask: MaskArguments,
    accumulate: bool,
    visits: Tensor | None,
    tile: Tile,
) -> dict[str, Any]:
    """The kernel's arguments by name."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    return {
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "lse": lse,
        "visits": visits,
        "scale": scale * math.log2(math.e),
        "num_heads": q.shape[2],
        **strides(q=q, k=k, v=v, out=out),
        **mask_arguments(mask, q, k, tile, own_is_queries=True),
        "GROUP": q.shape[2] // k.shape[2],
        "ACCUMULATE": accumulate,
    }


def _check_running(q: Tensor, out: Tensor, lse: Tensor) -> None:
    batch_size, length, heads, _ = q.shape
    for name, x, shape in (("out", out, q.shape), ("lse", lse, (batch_size, heads, length))):
        if x.dtype != torch.float32 or x.shape != shape or not x.is_contiguous() or x.device != q.device:
            raise ValueError(
                f"accumulate: {name} is {x.dtype} {list(x.shape)} on {x.device}; contiguous fp32 of shape "
                f"{list(shape)} on {q.device} is needed"
            )


@triton.jit
def _kernel(
    q,
    k,
    v,
    out,
    lse,
    visits,
    scale,
    num_heads,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    out_batch,
    out_row,
    out_head,
    own_bounds,
    other_bounds,
    own_bounds_batch,
    other_bounds_batch,
    num_other,
    window,
    q_positions,
    k_positions,
    q_starts,
    k_starts,
    q_starts_batch,
    k_starts_batch,
    ranges,
    ranges_batch,
    num_complete,
    q_length,
    k_length,
    CAUSAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    SCAN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    num_blocks, block = tl.num_programs(0), tl.program_id(0)
    if CAUSAL:  # the last queries see the most keys, so they go first
        block = num_blocks - 1 - block
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + (head // GROUP) * k_head
    v += batch * v_batch + (head // GROUP) * v_head
    if DOCUMENTS:
        q_starts += batch * q_starts_batch
        k_starts += batch * k_starts_batch
    own_bounds += batch * own_bounds_batch + block
    other_bounds += batch * other_bounds_batch
    ranges += batch * ranges_batch + 2 * block
    cursor, stop = tl.load(ranges), tl.load(ranges + 1)
    if ACCUMULATE and cursor >= stop:
        if visits is not None:
            tl.store(visits + tl.program_id(1) * num_blocks + block, 0)
        return

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q_block = load_rows(q, q_row, block * BLOCK_M, q_length, HEAD_DIM, BLOCK_D, BLOCK_M, True)
    q_position = row_positions(q_positions, row, q_length)[:, None]
    q_start = row_starts(q_starts, row, q_length)[:, None]
    lse += tl.program_id(1).to(tl.int64) * q_length + row
    column = tl.arange(0, BLOCK_D)[None, :]
    out += batch * out_batch + head * out_head + row[:, None].to(tl.int64) * out_row + column
    inside = (row[:, None] < q_length) & (column < HEAD_DIM)
    if ACCUMULATE:
        # A result over other keys is the state after having walked over them: lse is the maximum, and the sum is 1.
        total = tl.load(out, mask=inside, other=0.0)
        largest = tl.load(lse, mask=row < q_length, other=float("-inf")) * 1.4426950408889634
        normaliser = tl.where(largest == float("-inf"), 0.0, 1.0)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        normaliser = tl.zeros((BLOCK_M,), tl.float32)
    visited = 0
    while cursor < stop:
        whole_stop, part_stop, following = next_runs(
            cursor, stop, own_bounds, num_blocks, other_bounds, num_other, num_complete, window,
            CAUSAL, DOCUMENTS, True, SCAN,
        )  # fmt: skip
        for MASKED in tl.static_range(2):
            for index in range(whole_stop if MASKED else cursor, part_stop if MASKED else whole_stop):
                total, largest, normaliser = _visit(
                    total, largest, normaliser, q_block, k, k_row, v, v_row, index * BLOCK_N, scale,
                    q_position, q_start, k_positions, k_starts, k_length, window,
                    CAUSAL, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED,
                )  # fmt: skip
        visited += part_stop - cursor
        cursor = following

    if visits is not None:
        tl.store(visits + tl.program_id(1) * num_blocks + block, visited)
    seen = normaliser > 0.0
    own = tl.where(seen, largest * 0.6931471805599453 + tl.log(tl.where(seen, normaliser, 1.0)), float("-inf"))
    weight = 1.0 / tl.where(seen, normaliser, 1.0)
    total = total * weight[:, None]
    tl.store(out, total.to(out.dtype.element_ty), mask=inside)
    tl.store(lse, own, mask=row < q_length)


@triton.jit
def _visit(
    total, largest, normaliser, q_block, k, k_row, v, v_row, first, scale,
    q_position, q_start, k_positions, k_starts, k_length, window,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys, from row ``first`` on, added to the running result; MASKED where not every pair is allowed."""
    row = first + tl.arange(0, BLOCK_N)
    k_block = load_rows(k, k_row, first, k_length, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED)
    scores = tl.dot(q_block, tl.trans(k_block), input_precision="ieee")
    if MASKED:
        k_position = row_positions(k_positions, row, k_length)[None, :]
        k_start = row_starts(k_starts, row, k_length)[None, :]
        pairs = allowed(q_position, k_position, q_start, k_start, window, CAUSAL)
        scores = tl.where(pairs & (row < k_length)[None, :], scores, float("-inf"))
    highest = tl.maximum(largest, tl.max(scores, 1) * scale)
    # A row that has seen no key yet keeps -inf as its maximum, and is measured from 0 instead.
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    p = tl.exp2(scores * scale - reference[:, None])
    shrink = tl.exp2(largest - reference)
    normaliser = normaliser * shrink + tl.sum(p, 1)
    v_block = load_rows(v, v_row, first, k_length, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED)
    total = total * shrink[:, None]
    total = tl.dot(p.to(v_block.dtype), v_block, total, input_precision="ieee")
    return total, highest, normaliser
