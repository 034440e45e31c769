"""dK and dV of softmax attention over any mask: one program for each block of keys of one key head.

It walks over the blocks of queries that may see its keys, for all query heads that share its key head, and adds them up
in registers. Scores stand transposed, keys by queries, so that no product has to be transposed on the way.

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
    (64, False): {"sm_80": Tile(32, 128, 8, 2), "sm_90": Tile(64, 128, 8, 2), "sm_100": Tile(64, 128, 8, 2)},
    (128, False): {"sm_80": Tile(32, 64, 8, 2), "sm_90": Tile(32, 128, 8, 2), "sm_100": Tile(32, 64, 8, 2)},
    (256, False): {"sm_80": Tile(32, 32, 8, 2), "sm_90": Tile(64, 32, 8, 2), "sm_100": Tile(32, 32, 8, 2)},
    (64, True): {"sm_80": Tile(16, 16, 4, 1), "sm_90": Tile(16, 16, 4, 1), "sm_100": Tile(16, 16, 4, 1)},
    (128, True): {"sm_80": Tile(16, 16, 8, 1), "sm_90": Tile(16, 16, 8, 1), "sm_100": Tile(16, 16, 8, 1)},
}


def launch(
    saved: tuple[Tensor, ...],
    grads: tuple[Tensor, Tensor],
    scale: float,
    mask: MaskArguments,
    visits: Tensor | None,
    tile: Tile | None,
) -> None:
    """Write ``grad_k`` and ``grad_v``.

    Args:
        saved: grad_out, q, k, v [B, S, H, D] with the elements of a row side by side, and the queries' summary.
        grads: grad_k and grad_v [B, Sk, Hk, D].
        visits: int32 [B, Hk, key blocks] or None.
        tile: other blocks than the table's.
    """
    k = saved[2]
    tile = tile or tile_for(TILES, k)
    grid = (triton.cdiv(k.shape[1], tile.keys), k.shape[0] * k.shape[2])
    arguments = _arguments(saved, grads, scale, mask, visits, tile)
    _kernel[grid](**arguments, num_warps=tile.num_warps, num_stages=tile.num_stages)


def specializations() -> list[Specialization]:
    """See ``variants``."""
    return [_specialization(*variant) for variant in variants(TILES)]


def _specialization(dtype: torch.dtype, head_dim: int, chip: str, tile: Tile, general: bool) -> Specialization:
    name, saved, mask = example_of_backward(dtype, head_dim, general)
    grads = (saved[2].float(), saved[3].float())
    return of_launch(
        f"keys {name}",
        _kernel,
        _arguments(saved, grads, 0.125, mask, None, tile),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        tensor_cores=dtype != torch.float32,
        chips=(chip,),
        routine=is_routine(dtype, head_dim, chip, general),
    )


def _arguments(
    saved: tuple[Tensor, ...],
    grads: tuple[Tensor, Tensor],
    scale: float,
    mask: MaskArguments,
    visits: Tensor | None,
    tile: Tile,
) -> dict[str, Any]:
    """The kernel's arguments by name."""
    grad_out, q, k, v, summary = saved
    grad_k, grad_v = grads
    return {
        "grad_out": grad_out,
        "q": q,
        "k": k,
        "v": v,
        "summary": summary,
        "grad_k": grad_k,
        "grad_v": grad_v,
        "visits": visits,
        "scale": scale,
        "log2_scale": scale * math.log2(math.e),
        "num_key_heads": k.shape[2],
        "padded": summary.shape[3],
        **strides(grad_out=grad_out, q=q, k=k, v=v, grad=grad_k),
        **mask_arguments(mask, q, k, tile, own_is_queries=False),
        "GROUP": q.shape[2] // k.shape[2],
    }


@triton.jit
def _kernel(
    grad_out,
    q,
    k,
    v,
    summary,
    grad_k,
    grad_v,
    visits,
    scale,
    log2_scale,
    num_key_heads,
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
    batch = (tl.program_id(1) // num_key_heads).to(tl.int64)
    key_head = (tl.program_id(1) % num_key_heads).to(tl.int64)
    if DOCUMENTS:
        q_starts += batch * q_starts_batch
        k_starts += batch * k_starts_batch
    own_bounds += batch * own_bounds_batch + block
    other_bounds += batch * other_bounds_batch
    ranges += batch * ranges_batch + 2 * block

    first = block * BLOCK_N
    k_block = load_rows(
        k + batch * k_batch + key_head * k_head, k_row, first, k_length, HEAD_DIM, BLOCK_D, BLOCK_N, True
    )
    v_block = load_rows(
        v + batch * v_batch + key_head * v_head, v_row, first, k_length, HEAD_DIM, BLOCK_D, BLOCK_N, True
    )
    row = first + tl.arange(0, BLOCK_N)
    k_position = row_positions(k_positions, row, k_length)[:, None]
    k_start = row_starts(k_starts, row, k_length)[:, None]
    total_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    total_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    visited = 0
    for member in range(GROUP):
        head = key_head * GROUP + member
        q_here = q + batch * q_batch + head * q_head
        grad_out_here = grad_out + batch * grad_out_batch + head * grad_out_head
        log2_lse = summary + (batch * num_key_heads * GROUP + head) * padded
        delta = log2_lse + tl.num_programs(1).to(tl.int64) * GROUP * padded
        cursor, stop = tl.load(ranges), tl.load(ranges + 1)
        while cursor < stop:
            whole_stop, part_stop, following = next_runs(
                cursor, stop, own_bounds, num_blocks, other_bounds, num_other, num_complete, window,
                CAUSAL, DOCUMENTS, False, SCAN,
            )  # fmt: skip
            for MASKED in tl.static_range(2):
                for index in range(whole_stop if MASKED else cursor, part_stop if MASKED else whole_stop):
                    total_k, total_v = _visit(
                        total_k, total_v, k_block, v_block, q_here, q_row, grad_out_here, grad_out_row,
                        log2_lse, delta, index * BLOCK_M, log2_scale,
                        k_position, k_start, q_positions, q_starts, q_length, window,
                        CAUSAL, HEAD_DIM, BLOCK_D, BLOCK_M, MASKED,
                    )  # fmt: skip
            visited += part_stop - cursor
            cursor = following

    if visits is not None:
        tl.store(visits + tl.program_id(1) * num_blocks + block, visited)
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (row[:, None] < k_length) & (column < HEAD_DIM)
    place = batch * grad_batch + key_head * grad_head + row[:, None].to(tl.int64) * grad_row + column
    tl.store(grad_k + place, (total_k * scale).to(grad_k.dtype.element_ty), mask=inside)
    tl.store(grad_v + place, total_v.to(grad_v.dtype.element_ty), mask=inside)


@triton.jit
def _visit(
    total_k, total_v, k_block, v_block, q, q_row, grad_out, grad_out_row, log2_lse, delta, first, log2_scale,
    k_position, k_start, q_positions, q_starts, q_length, window,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of queries, from row ``first`` on, added to the gradients; MASKED where not every pair is allowed."""
    row = first + tl.arange(0, BLOCK_M)
    q_block = load_rows(q, q_row, first, q_length, HEAD_DIM, BLOCK_D, BLOCK_M, True)
    scores = tl.dot(k_block, tl.trans(q_block), input_precision="ieee")
    p = tl.exp2(scores * log2_scale - tl.load(log2_lse + row)[None, :])
    if MASKED:
        q_position = row_positions(q_positions, row, q_length)[None, :]
        q_start = row_starts(q_starts, row, q_length)[None, :]
        p = tl.where(allowed(q_position, k_position, q_start, k_start, window, CAUSAL), p, 0.0)
    grad_out_block = load_rows(grad_out, grad_out_row, first, q_length, HEAD_DIM, BLOCK_D, BLOCK_M, True)
    total_v = tl.dot(p.to(grad_out_block.dtype), grad_out_block, total_v, input_precision="ieee")
    grad_p = tl.dot(v_block, tl.trans(grad_out_block), input_precision="ieee")
    grad_scores = p * (grad_p - tl.load(delta + row)[None, :])
    total_k = tl.dot(grad_scores.to(q_block.dtype), q_block, total_k, input_precision="ieee")
    return total_k, total_v
