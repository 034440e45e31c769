"""Kernel: back through both convolutions and the q-k-mean of the CCGQA prologue.

Both convolutions together are one with k0 + k1 - 1 taps of D x D weights a head: M_e = sum over d + i = e of
diag(w0_i) W1_d, i and d the delays. So dz_s = sum_e M_e dy_{s+e}, and all gradients of the weights follow from
X_e = sum_s z_s (x) dy_{s+e}. A program owns a block of one head's input channels, holds that block of every M_e and of
every X_e on the chip, and goes over its share of the row tiles. The rows before each chunk, where they are given, count
as rows.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment,misc,var-annotated"

from typing import Any

import torch
import triton
import triton.language as tl

from hydra_dist.kernels.ccgqa_prologue_examples import EXAMPLES, Example
from hydra_dist.kernels.ccgqa_prologue_ranges import RowRange
from hydra_dist.kernels.ccgqa_prologue_rows import (
    begins_a_chunk,
    index_of,
    locate,
    padded,
    row_before,
    rows_at,
    transposed_tap,
)
from hydra_dist.kernels.ccgqa_prologue_workspace import Workspace, example_workspace
from hydra_dist.kernels.specialization import Specialization, of_launch


def launch(workspace: Workspace, rows: RowRange) -> None:
    """Write a range's latent channels of grad_p and grad_z_before, and add it to the parts that make up X."""
    tiling = workspace.tiling
    options = {"num_warps": tiling.num_warps, "num_stages": workspace.num_stages}
    through_convolutions[(workspace.num_parts * workspace.blocks,)](**_arguments(workspace, rows), **options)


def specializations() -> list[Specialization]:
    """The variants for ``EXAMPLES``."""
    return [_specialization(example, chip) for example in EXAMPLES for chip in example.chips]


def _specialization(example: Example, chip: str) -> Specialization:
    workspace, _ = example_workspace(example, chip)
    arguments, tiling = _arguments(workspace, workspace.ranges[0]), workspace.tiling
    return of_launch(
        f"prologue, convolutions backward: {example}",
        through_convolutions,
        arguments,
        num_warps=tiling.num_warps,
        num_stages=workspace.num_stages,
        tensor_cores=example.dtype != torch.float32,
        chips=(chip,),
        routine=example.routine,
    )


def _arguments(workspace: Workspace, rows: RowRange) -> dict[str, Any]:
    shape = workspace.shape
    return {
        "dy": workspace.dy,
        "p": rows.batch_of(workspace.p),
        "z_before": rows.batch_of(workspace.z_before),
        "ages": rows.batch_of(workspace.ages),
        "w0": workspace.w0,
        "w1": workspace.w1,
        "grad_p": rows.batch_of(workspace.grad_p),
        "grad_z_before": rows.batch_of(workspace.grad_z_before),
        "x_parts": workspace.x_parts,
        "batch_size": rows.batch_size,
        **workspace.rows_of(rows),
        "p_batch_stride": workspace.p.stride(0),
        "p_row_stride": workspace.p.stride(1),
        **workspace.heads_and_taps(),
        "MEAN": shape.use_qk_mean,
        "ROWS": workspace.rows,
        "CHANNELS": workspace.channels,
        "BLOCKS": workspace.blocks,
        "LANES": padded(shape.head_dim),
    }


@triton.jit
def through_convolutions(
    dy,
    p,
    z_before,
    ages,
    w0,
    w1,
    grad_p,
    grad_z_before,
    x_parts,
    batch_size,
    num_rows,
    first_chunk,
    first_row,
    stop_row,
    dy_rows,
    adds,
    p_batch_stride,
    p_row_stride,
    query_splits,
    key_splits,
    NUM_QUERY_HEADS: tl.constexpr,
    NUM_KEY_HEADS: tl.constexpr,
    D: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The latent channels of grad_p, grad_z_before, and each program's part of X."""
    program = tl.program_id(0)
    keys = program - NUM_QUERY_HEADS * BLOCKS * query_splits
    if keys < 0:
        column = program % (NUM_QUERY_HEADS * BLOCKS)
        _block(
            dy, p, z_before, ages, w0, w1, grad_p, grad_z_before, x_parts, batch_size, num_rows, first_chunk,
            first_row, stop_row, dy_rows, adds, p_batch_stride, p_row_stride, column // BLOCKS, column % BLOCKS,
            program // (NUM_QUERY_HEADS * BLOCKS), query_splits, program // BLOCKS,
            False, NUM_QUERY_HEADS, NUM_KEY_HEADS, D, K0, K1, MEAN, ROWS, CHANNELS, LANES,
        )  # fmt: skip
    else:
        column = keys % (NUM_KEY_HEADS * BLOCKS)
        _block(
            dy, p, z_before, ages, w0, w1, grad_p, grad_z_before, x_parts, batch_size, num_rows, first_chunk,
            first_row, stop_row, dy_rows, adds, p_batch_stride, p_row_stride, column // BLOCKS, column % BLOCKS,
            keys // (NUM_KEY_HEADS * BLOCKS), key_splits, program // BLOCKS,
            True, NUM_QUERY_HEADS, NUM_KEY_HEADS, D, K0, K1, MEAN, ROWS, CHANNELS, LANES,
        )  # fmt: skip


@triton.jit
def _block(
    dy, p, z_before, ages, w0, w1, grad_p, grad_z_before, x_parts, batch_size, num_rows, first_chunk, first_row,
    stop_row, dy_rows, adds, p_batch_stride, p_row_stride, head, block, split, num_splits, part,
    IS_KEY: tl.constexpr, NUM_QUERY_HEADS: tl.constexpr, NUM_KEY_HEADS: tl.constexpr, D: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """CHANNELS input channels of one head, every ``num_splits``-th tile from the ``split``-th before the last one on:
    what was written last is the most likely to be in the cache."""
    C: tl.constexpr = (NUM_QUERY_HEADS + NUM_KEY_HEADS) * D
    WIDTH: tl.constexpr = C + NUM_KEY_HEADS * D
    GROUP: tl.constexpr = NUM_QUERY_HEADS // NUM_KEY_HEADS
    TAPS: tl.constexpr = K0 + K1 - 1
    BEFORE: tl.constexpr = TAPS - 1 if z_before is not None else 0
    latent_head = head + NUM_QUERY_HEADS if IS_KEY else head
    first_partner = head * GROUP if IS_KEY else NUM_QUERY_HEADS + head // GROUP
    outputs = tl.arange(0, LANES)
    inputs = block * CHANNELS + tl.arange(0, CHANNELS)
    inside = inputs < D
    channels = latent_head * D + inputs
    weights, sums = (), ()
    if w1 is not None:
        for tap in tl.static_range(TAPS):
            weights = weights + (_composite(w0, w1, latent_head, inputs, tap, D, K0, K1, LANES, CHANNELS, p),)
            sums = sums + (tl.zeros((LANES, CHANNELS), tl.float32),)
    first_dy = dy - first_row.to(tl.int64) * C
    start = index_of(first_row, num_rows, first_chunk, BEFORE)
    stop = index_of(stop_row, num_rows, first_chunk, BEFORE)
    tiles_per_batch = tl.cdiv(stop - start, ROWS)
    num_tiles = batch_size * tiles_per_batch
    for tile in range(num_tiles - 1 - split, -1, -num_splits):
        batch, row, near, chunk, offset, length, exists = locate(
            tile, tiles_per_batch, start, stop, num_rows, first_chunk, BEFORE, ROWS
        )
        leads = begins_a_chunk(tile, tiles_per_batch, start, num_rows, first_chunk, BEFORE, BEFORE, ROWS)
        token = batch * num_rows + row
        grads = rows_at(first_dy, batch * dy_rows + row, near, C)
        mask = exists[:, None] & inside[None, :]
        dz = tl.zeros((ROWS, CHANNELS), tl.float32)
        if w1 is None or MEAN:
            there = mask & (offset >= 0)[:, None]
            own = tl.load(grads[:, None] + channels[None, :], mask=there, other=0.0).to(tl.float32)
            dz += own * ((1.0 if w1 is None else 0.0) + (0.5 if MEAN else 0.0))
            if MEAN:
                for partner in tl.static_range(GROUP if IS_KEY else 1):
                    theirs = (first_partner + partner) * D + inputs
                    grad = tl.load(grads[:, None] + theirs[None, :], mask=there, other=0.0)
                    dz += grad.to(tl.float32) * (0.5 if IS_KEY else 0.5 / GROUP)
        if w1 is not None:
            source = rows_at(p + batch * p_batch_stride, row, near, p_row_stride)[:, None] + channels[None, :]
            z = tl.load(source, mask=mask & (offset >= 0)[:, None], other=0.0, eviction_policy="evict_first")
            if z_before is not None and leads:
                before = row_before(z_before, batch, chunk, offset, num_rows, first_chunk, BEFORE, C)
                z += tl.load(before[:, None] + channels[None, :], mask=mask & (offset < 0)[:, None], other=0.0)
            updated = ()
            for tap in tl.static_range(TAPS):
                read = exists & (offset + tap >= 0) & (offset + tap < length)
                if ages is not None and tap > 0:
                    read = read & (tl.load(ages + token + tap + near, mask=read, other=0) >= tap)
                # The taps' rows overlap: the first cache keeps them, and the second is read once.
                grad = tl.load(
                    (grads + tap * C + latent_head * D)[:, None] + outputs[None, :],
                    mask=read[:, None] & (outputs < D)[None, :],
                    other=0.0,
                    cache_modifier=".ca",
                )
                dz = tl.dot(grad, weights[tap], dz, input_precision="ieee")
                updated = updated + (tl.dot(tl.trans(grad), z, sums[tap], input_precision="ieee"),)
            sums = updated
        target = rows_at(grad_p, token, near, WIDTH)[:, None] + channels[None, :]
        rounded = dz.to(p.dtype.element_ty)
        tl.store(target, rounded, mask=mask & (offset >= 0)[:, None], eviction_policy="evict_first")
        if z_before is not None and leads:
            before = row_before(grad_z_before, batch, chunk, offset, num_rows, first_chunk, BEFORE, C)
            tl.store(before[:, None] + channels[None, :], rounded, mask=mask & (offset < 0)[:, None])
    if w1 is not None:
        for tap in tl.static_range(TAPS):
            target = x_parts + (part.to(tl.int64) * TAPS + tap) * D * D + outputs[:, None] * D + inputs[None, :]
            within = (outputs < D)[:, None] & inside[None, :]
            tl.store(target, sums[tap] + tl.load(target, mask=within & adds, other=0.0), mask=within)


@triton.jit
def _composite(
    w0, w1, head, inputs, TAP: tl.constexpr, D: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, LANES: tl.constexpr,
    CHANNELS: tl.constexpr, p,
):  # fmt: skip
    """M of one tap, transposed, [D out, CHANNELS], summed in fp32 and rounded once to the dtype of p."""
    total = tl.zeros((LANES, CHANNELS), tl.float32)
    for later in tl.static_range(K1):
        if TAP - later >= 0 and TAP - later < K0:
            factor = tl.load(w0 + (head * D + inputs) * K0 + (K0 - 1 - (TAP - later)), mask=inputs < D, other=0.0)
            total += transposed_tap(w1, head, inputs, later, D, K1, LANES) * factor.to(tl.float32)[None, :]
    return total.to(p.dtype.element_ty)
