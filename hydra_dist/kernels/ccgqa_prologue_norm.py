"""Kernel: the gradients of queries, keys and values back to the outputs of the convolutions and to the projection.

The queries and keys themselves say what the norm and the rotation saw, so nothing is computed again. A program takes
one head (or the value channels of one) of one tile of rows.
"""

# mypy: allow-untyped-defs

from collections.abc import Mapping, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hydra_dist.kernels.ccgqa_prologue_examples import EXAMPLES, Example
from hydra_dist.kernels.ccgqa_prologue_ranges import RowRange
from hydra_dist.kernels.ccgqa_prologue_rows import Shape, channel_of, locate, rotated, row_before, rows_at
from hydra_dist.kernels.ccgqa_prologue_workspace import Workspace, example_workspace
from hydra_dist.kernels.specialization import Specialization, of_launch

NUM_WARPS = 4


def inputs(
    shape: Shape, grads: Sequence[Tensor], q: Tensor, k: Tensor, inv: Tensor, cos: Tensor | None, sin: Tensor | None
) -> dict[str, Tensor | None]:
    """The tensors that only this kernel reads, as it takes them, by argument."""
    grads = [x if x.stride(-1) == 1 else x.contiguous() for x in grads]
    return {
        **dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True)),
        "q": q.contiguous(),
        "k": k.contiguous(),
        "inv": None if shape.eps is None else inv.contiguous(),
        "cos": None if cos is None else cos.contiguous(),
        "sin": None if sin is None else sin.contiguous(),
    }


def launch(workspace: Workspace, tensors: Mapping[str, Tensor | None], rows: RowRange) -> None:
    """Write a range's dy, value channels of grad_p and grad_v_before, and what the gradients of b1 and beta are summed
    from."""
    shape = workspace.shape
    tiles = triton.cdiv(
        min(rows.stop + workspace.num_after, workspace.p.shape[1]) - rows.first, workspace.tiling.norm_rows
    )
    grid = (shape.num_heads + shape.num_key_heads, rows.batch_size * tiles)
    through_norm[grid](**_arguments(workspace, tensors, rows), num_warps=NUM_WARPS, num_stages=1)


def specializations() -> list[Specialization]:
    """The variants for ``EXAMPLES``."""
    return [_specialization(example, chip) for example in EXAMPLES for chip in example.chips]


def _specialization(example: Example, chip: str) -> Specialization:
    workspace, rest = example_workspace(example, chip)
    arguments = _arguments(workspace, inputs(workspace.shape, *rest), workspace.ranges[0])
    return of_launch(
        f"prologue, norm backward: {example}",
        through_norm,
        arguments,
        num_warps=NUM_WARPS,
        num_stages=1,
        tensor_cores=False,
        chips=(chip,),
        routine=example.routine,
    )


def _arguments(workspace: Workspace, tensors: Mapping[str, Tensor | None], rows: RowRange) -> dict[str, Any]:
    shape = workspace.shape
    grads, cos = {name: tensors[f"grad_{name}"] for name in "qkv"}, tensors["cos"]
    strides = {
        f"grad_{name}_{axis}_stride": grad.stride(number)
        for name, grad in grads.items()
        for number, axis in enumerate(("batch", "row", "head"))
        if grad is not None
    }
    return {
        **{name: x if name in ("cos", "sin") else rows.batch_of(x) for name, x in tensors.items()},
        "beta": workspace.beta,
        "ages": rows.batch_of(workspace.ages),
        "dy": workspace.dy,
        "grad_p": rows.batch_of(workspace.grad_p),
        "grad_v_before": rows.batch_of(workspace.grad_v_before),
        "b1_parts": workspace.b1_parts,
        "beta_parts": workspace.beta_parts,
        **workspace.rows_of(rows),
        **strides,
        "dy_row_stride": workspace.dy.shape[-1],
        "NUM_QUERY_HEADS": shape.num_query_heads,
        "NUM_KEY_HEADS": shape.num_key_heads,
        "D": shape.head_dim,
        "HALF": 0 if cos is None else cos.shape[-1],
        "SHIFT": shape.value_shift,
        "AFTER": workspace.num_after,
        "ROWS": workspace.tiling.norm_rows,
        "PAIRS": triton.next_power_of_2(shape.head_dim // 2),
    }


@triton.jit
def through_norm(
    grad_q,
    grad_k,
    grad_v,
    q,
    k,
    inv,
    beta,
    cos,
    sin,
    ages,
    dy,
    grad_p,
    grad_v_before,
    b1_parts,
    beta_parts,
    num_rows,
    first_chunk,
    first_row,
    stop_row,
    dy_rows,
    adds,
    grad_q_batch_stride,
    grad_q_row_stride,
    grad_q_head_stride,
    grad_k_batch_stride,
    grad_k_row_stride,
    grad_k_head_stride,
    grad_v_batch_stride,
    grad_v_row_stride,
    grad_v_head_stride,
    dy_row_stride,
    NUM_QUERY_HEADS: tl.constexpr,
    NUM_KEY_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    SHIFT: tl.constexpr,
    AFTER: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """dy (gradients before norm and rotation), the value channels of grad_p, and a tile's sums for b1 and beta."""
    column = tl.program_id(0)
    tile = tl.program_id(1)
    if column < NUM_QUERY_HEADS:
        _head_through_norm(
            grad_q, q, inv, beta, cos, sin, dy, b1_parts, beta_parts, num_rows, first_chunk, first_row, stop_row,
            dy_rows, adds, grad_q_batch_stride, grad_q_row_stride, grad_q_head_stride, dy_row_stride, tile, column,
            False, NUM_QUERY_HEADS, NUM_KEY_HEADS, D, HALF, AFTER, ROWS, PAIRS,
        )  # fmt: skip
    elif column < NUM_QUERY_HEADS + NUM_KEY_HEADS:
        _head_through_norm(
            grad_k, k, inv, beta, cos, sin, dy, b1_parts, beta_parts, num_rows, first_chunk, first_row, stop_row,
            dy_rows, adds, grad_k_batch_stride, grad_k_row_stride, grad_k_head_stride, dy_row_stride, tile,
            column - NUM_QUERY_HEADS, True, NUM_QUERY_HEADS, NUM_KEY_HEADS, D, HALF, AFTER, ROWS, PAIRS,
        )  # fmt: skip
    else:
        _values(
            grad_v, ages, grad_p, grad_v_before, num_rows, first_chunk, first_row, stop_row, grad_v_batch_stride,
            grad_v_row_stride, grad_v_head_stride, tile, column - NUM_QUERY_HEADS - NUM_KEY_HEADS,
            NUM_QUERY_HEADS, NUM_KEY_HEADS, D, SHIFT, AFTER, ROWS, PAIRS,
        )  # fmt: skip


@triton.jit
def _head_through_norm(
    grad, out, inv, beta, cos, sin, dy, b1_parts, beta_parts, num_rows, first_chunk, first_row, stop_row, dy_rows, adds,
    batch_stride, row_stride, head_stride, dy_row_stride, tile, head,
    IS_KEY: tl.constexpr, NUM_QUERY_HEADS: tl.constexpr, NUM_KEY_HEADS: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, AFTER: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    NUM_HEADS: tl.constexpr = NUM_QUERY_HEADS + NUM_KEY_HEADS
    HEADS_HERE: tl.constexpr = NUM_KEY_HEADS if IS_KEY else NUM_QUERY_HEADS
    latent_head = head + NUM_QUERY_HEADS if IS_KEY else head
    stop = tl.minimum(stop_row + AFTER, num_rows)
    batch, row, near, _, _, _, exists = locate(
        tile, tl.cdiv(stop - first_row, ROWS), first_row, stop, num_rows, first_chunk, 0, ROWS
    )
    token = batch * num_rows + row
    # The rows behind the range are read by its convolutions; what is summed over rows belongs to the range after.
    own = near < stop_row - row
    pair = tl.arange(0, PAIRS)
    there = exists[:, None] & (pair < D // 2)[None, :]
    a, b = channel_of(pair, 0, HALF, D), channel_of(pair, 1, HALF, D)
    source = rows_at(grad + batch * batch_stride + head * head_stride, row, near, row_stride)[:, None]
    first = tl.load(source + a[None, :], mask=there, other=0.0, eviction_policy="evict_first").to(tl.float32)
    second = tl.load(source + b[None, :], mask=there, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if inv is not None:
        source = rows_at(out + head * D, token, near, HEADS_HERE * D)[:, None]
        out_first = tl.load(source + a[None, :], mask=there, other=0.0, eviction_policy="evict_first").to(tl.float32)
        out_second = tl.load(source + b[None, :], mask=there, other=0.0, eviction_policy="evict_first").to(tl.float32)
        along = tl.sum(first * out_first + second * out_second, axis=1)
        factor = tl.load(rows_at(inv + latent_head, token, near, NUM_HEADS), mask=exists, other=0.0)
        share = along / D
        if IS_KEY and beta is not None:
            temperature = tl.load(beta + head).to(tl.float32)
            _add(
                beta_parts + tile * NUM_KEY_HEADS + head, tl.sum(tl.where(own, along, 0.0), axis=0) / temperature, adds
            )
            share /= temperature * temperature
            factor *= temperature
        first = (first - out_first * share[:, None]) * factor[:, None]
        second = (second - out_second * share[:, None]) * factor[:, None]
    if HALF > 0:
        first, second = rotated(first, second, cos, sin, row, near, exists, HALF, PAIRS, True)
    target = rows_at(dy + latent_head * D, batch * dy_rows + row - first_row, near, dy_row_stride)[:, None]
    tl.store(target + a[None, :], first.to(dy.dtype.element_ty), mask=there)
    tl.store(target + b[None, :], second.to(dy.dtype.element_ty), mask=there)
    if b1_parts is not None:
        sums = b1_parts + (tile.to(tl.int64) * NUM_HEADS + latent_head) * D
        _add(sums + a, tl.sum(tl.where(own[:, None], first, 0.0), axis=0), adds, pair < D // 2)
        _add(sums + b, tl.sum(tl.where(own[:, None], second, 0.0), axis=0), adds, pair < D // 2)


@triton.jit
def _add(target, value, adds, mask=True):
    """Store ``value``, added to what is there where the ranges before have left something."""
    tl.store(target, value + tl.load(target, mask=mask & adds, other=0.0), mask=mask)


@triton.jit
def _values(
    grad_v, ages, grad_p, grad_v_before, num_rows, first_chunk, first_row, stop_row, batch_stride, row_stride,
    head_stride, tile, block, NUM_QUERY_HEADS: tl.constexpr, NUM_KEY_HEADS: tl.constexpr, D: tl.constexpr,
    SHIFT: tl.constexpr, AFTER: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """D / 2 channels of the values' first half and as many, of the row after, of the second."""
    LATENT: tl.constexpr = (NUM_QUERY_HEADS + NUM_KEY_HEADS) * D
    HALF_SIZE: tl.constexpr = NUM_KEY_HEADS * D // 2
    tiles_per_batch = tl.cdiv(tl.minimum(stop_row + AFTER, num_rows) - first_row, ROWS)
    batch, row, near, chunk, offset, length, exists = locate(
        tile, tiles_per_batch, first_row, stop_row, num_rows, first_chunk, 0, ROWS
    )
    token = batch * num_rows + row
    lanes = tl.arange(0, PAIRS)[None, :]
    inside = lanes < D // 2
    there = exists[:, None] & inside
    rows = rows_at(grad_v + batch * batch_stride, row, near, row_stride)
    current = rows + (block // 2) * head_stride + (block % 2) * (D // 2)
    other = block + NUM_KEY_HEADS
    delayed = rows + (other // 2) * head_stride + (other % 2) * (D // 2)
    target = rows_at(grad_p + LATENT + block * (D // 2), token, near, LATENT + 2 * HALF_SIZE)[:, None] + lanes
    tl.store(target, tl.load(current[:, None] + lanes, mask=there), mask=there)
    read, source = exists, delayed
    if SHIFT:
        read, source = exists & (offset + 1 < length), delayed + row_stride
        if ages is not None:
            read = read & (tl.load(ages + token + 1 + near, mask=read, other=0) > 0)
    value = tl.load(source[:, None] + lanes, mask=read[:, None] & inside, other=0.0)
    tl.store(target + HALF_SIZE, value, mask=there)
    if SHIFT and grad_v_before is not None:
        leads = exists & (offset == 0)
        read = leads
        if ages is not None:
            read = read & (tl.load(ages + token + near, mask=leads, other=0) > 0)
        value = tl.load(delayed[:, None] + lanes, mask=read[:, None] & inside, other=0.0)
        before = row_before(grad_v_before, batch, chunk, offset - 1, num_rows, first_chunk, 1, HALF_SIZE)
        tl.store((before + block * (D // 2))[:, None] + lanes, value, mask=leads[:, None] & inside)
