"""dQ of softmax attention over any mask: one program for each block of queries of one head, which walks over keys.

The equations are in ``hydra_dist.kernels.attention_backward``.
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
    example_of_backward,
    is_routine,
    mask_arguments,
    strides,
    tile_for,
    variants,
)
from hydra_dist.kernels.specialization import Specialization, of_launch

TILES: TileTable = {
    # (largest head_dim, fp32 inputs): chip: queries, keys, warps, stages
    (64, False): {"sm_80": Tile(128, 32, 8, 2), "sm_90": Tile(128, 64, 8, 2), "sm_100": Tile(128, 64, 8, 2)},
    (128, False): {"sm_80": Tile(64, 32, 4, 2), "sm_90": Tile(128, 64, 8, 2), "sm_100": Tile(64, 64, 8, 2)},
    (256, False): {"sm_80": Tile(64, 16, 8, 2), "sm_90": Tile(128, 32, 8, 2), "sm_100": Tile(32, 32, 8, 2)},
    (64, True): {"sm_80": Tile(32, 32, 8, 1), "sm_90": Tile(32, 32, 8, 1), "sm_100": Tile(32, 32, 8, 1)},
    (128, True): {"sm_80": Tile(32, 32, 4, 2), "sm_90": Tile(32, 32, 4, 2), "sm_100": Tile(32, 32, 4, 2)},
}


def launch(
    saved: tuple[Tensor, ...],
    grad_q: Tensor,
    scale: float,
    mask: MaskArguments,
    visits: Tensor | None,
    tile: Tile | None,
) -> None:
    """Write ``grad_q``.

    Args:
        saved: grad_out, q, k, v [B, S, H, D] with the elements of a row side by side, and the queries' summary.
        grad_q: [B, Sq, Hq, D].
        visits: int32 [B, Hq, query blocks] or None.
        tile: other blocks than the table's.
    """
    q = saved[1]
    tile = tile or tile_for(TILES, q)
    grid = (triton.cdiv(q.shape[1], tile.queries), q.shape[0] * q.shape[2])
    arguments = _arguments(saved, grad_q, scale, mask, visits, tile)
    _kernel[grid](**arguments, num_warps=tile.num_warps, num_stages=tile.num_stages)


def specializations() -> list[Specialization]:
    """See ``variants``."""
    return [_specialization(*variant) for variant in variants(TILES)]


def _specialization(dtype: torch.dtype, head_dim: int, chip: str, tile: Tile, general: bool) -> Specialization:
    name, saved, mask = example_of_backward(dtype, head_dim, general)
    return of_launch(
        f"queries {name}",
        _kernel,
        _arguments(saved, saved[1].float(), 0.125, mask, None, tile),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        tensor_cores=dtype != torch.float32,
        chips=(chip,),
        routine=is_routine(dtype, head_dim, chip, general),
    )


def _arguments(
    saved: tuple[Tensor, ...],
    grad_q: Tensor,
    scale: float,
    mask: MaskArguments,
    visits: Tensor | None,
    tile: Tile,
) -> dict[str, Any]:
    """The kernel's arguments by name."""
    grad_out, q, k, v, summary = saved
    return {
        "grad_out": grad_out,
        "q": q,
        "k": k,
        "v": v,
        "summary": summary,
        "grad_q": grad_q,
        "visits": visits,
        "scale": scale,
        "log2_scale": scale * math.log2(math.e),
        "num_heads": q.shape[2],
        "padded": summary.shape[3],
        **strides(grad_out=grad_out, q=q, k=k, v=v, grad=grad_q),
        **mask_arguments(mask, q, k, tile, own_is_queries=True),
        "GROUP": q.shape[2] // k.shape[2],
    }


@triton.jit
def _kernel(
    grad_out,
    q,
    k,
    v,
    summary,
    grad_q,
    visits,
    scale,
    log2_scale,
    num_heads,
    padded,
    grad_out_batch,
    grad_out_row,
    grad_out_head,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    grad_batch,
    grad_row,
    grad_head,
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
):
    num_blocks, block = tl.num_programs(0), tl.program_id(0)
    if CAUSAL:  # the last queries see the most keys, so they go first
        block = num_blocks - 1 - block
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    k += batch * k_batch + (head // GROUP) * k_head
    v += batch * v_batch + (head // GROUP) * v_head
    q += batch * q_batch + head * q_head
    grad_out += batch * grad_out_batch + head * grad_out_head
    if DOCUMENTS:
        q_starts += batch * q_starts_batch
        k_starts += batch * k_starts_batch
    own_bounds += batch * own_bounds_batch + block
    other_bounds += batch * other_bounds_batch
    ranges += batch * ranges_batch + 2 * block

    first = block * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    q_block = load_rows(q, q_row, first, q_length, HEAD_DIM, BLOCK_D, BLOCK_M, True)
    grad_out_block = load_rows(grad_out, grad_out_row, first, q_length, HEAD_DIM, BLOCK_D, BLOCK_M, True)
    summary += tl.program_id(1).to(tl.int64) * padded + row
    log2_lse = tl.load(summary)[:, None]
    row_delta = tl.load(summary + tl.num_programs(1).to(tl.int64) * padded)[:, None]
    q_position = row_positions(q_positions, row, q_length)[:, None]
    q_start = row_starts(q_starts, row, q_length)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    visited = 0
    cursor, stop = tl.load(ranges), tl.load(ranges + 1)
    while cursor < stop:
        whole_stop, part_stop, following = next_runs(
            cursor, stop, own_bounds, num_blocks, other_bounds, num_other, num_complete, window,
            CAUSAL, DOCUMENTS, True, SCAN,
        )  # fmt: skip
        for MASKED in tl.static_range(2):
            for index in range(whole_stop if MASKED else cursor, part_stop if MASKED else whole_stop):
                total = _visit(
                    total, q_block, grad_out_block, log2_lse, row_delta, k, k_row, v, v_row,
                    index * BLOCK_N, log2_scale, q_position, q_start, k_positions, k_starts, k_length, window,
                    CAUSAL, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED,
                )  # fmt: skip
        visited += part_stop - cursor
        cursor = following

    if visits is not None:
        tl.store(visits + tl.program_id(1) * num_blocks + block, visited)
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (row[:, None] < q_length) & (column < HEAD_DIM)
    place = batch * grad_batch + head * grad_head + row[:, None].to(tl.int64) * grad_row + column
    tl.store(grad_q + place, (total * scale).to(grad_q.dtype.element_ty), mask=inside)


@triton.jit
def _visit(
    total, q_block, grad_out_block, log2_lse, row_delta, k, k_row, v, v_row, first, log2_scale,
    q_position, q_start, k_positions, k_starts, k_length, window,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys, from row ``first`` on, added to the gradient; MASKED where not every pair is allowed."""
    row = first + tl.arange(0, BLOCK_N)
    k_block = load_rows(k, k_row, first, k_length, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED)
    scores = tl.dot(q_block, tl.trans(k_block), input_precision="ieee")
    p = tl.exp2(scores * log2_scale - log2_lse)
    if MASKED:
        k_position = row_positions(k_positions, row, k_length)[None, :]
        k_start = row_starts(k_starts, row, k_length)[None, :]
        pairs = allowed(q_position, k_position, q_start, k_start, window, CAUSAL)
        p = tl.where(pairs & (row < k_length)[None, :], p, 0.0)
    v_block = load_rows(v, v_row, first, k_length, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED)
    grad_p = tl.dot(grad_out_block, tl.trans(v_block), input_precision="ieee")
    grad_scores = p * (grad_p - row_delta)
    return tl.dot(grad_scores.to(k_block.dtype), k_block, total, input_precision="ieee")
