"""The forward of the CCGQA prologue as one Triton kernel: packed projection in, queries, keys and values out.

A program owns one head (or the value channels of one) and a share of the row tiles. The weights of its head's grouped
convolution are loaded once and stay on the chip; z is read from memory once, the delayed rows and the other heads of
the q-k-mean come through the caches. The reference, with the formulas, is ``hydra_dist/model/prologue_plain.py``.

Source: Figliolia et al. 2025 (arXiv 2510.04476), section III and listing A.1.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment,misc,var-annotated"

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydra_dist.kernels.ccgqa_prologue_examples import EXAMPLES, Example
from hydra_dist.kernels.ccgqa_prologue_heads import head_rows, value_rows
from hydra_dist.kernels.ccgqa_prologue_rows import (
    Shape,
    check,
    chip_of,
    deal,
    num_processors,
    on_device,
    padded,
    refuses,
    tiling_for,
)
from hydra_dist.kernels.specialization import Specialization, of_launch

__all__ = ["TILINGS", "Tiling", "forward", "refuses", "specializations"]


@dataclass(frozen=True)
class Tiling:
    """How the kernel is cut."""

    rows: int
    """Of a tile."""
    channels: int
    """Input channels of a head that are multiplied at a time, with up to 4 taps; with more taps fewer."""
    num_warps: int
    programs: int
    """That a multiprocessor runs at a time."""
    resident_bytes: int = 128 * 1024
    """Up to this size the weights of a head stay in shared memory; larger ones are read again for every tile."""


TILINGS = {
    # Chip, bytes of an element, padded head_dim; other chips than sm_90 differ where they are named. Chosen by what the
    # compiler says of registers and shared memory, not by measured times.
    ("sm_90", 2, 16): Tiling(64, 16, 4, 4),
    ("sm_90", 2, 32): Tiling(64, 32, 4, 4),
    ("sm_90", 2, 64): Tiling(64, 64, 4, 3),
    ("sm_90", 2, 128): Tiling(64, 32, 4, 2),
    ("sm_90", 2, 256): Tiling(32, 16, 8, 1),
    ("sm_90", 4, 16): Tiling(32, 16, 4, 4),
    ("sm_90", 4, 32): Tiling(32, 32, 4, 4),
    ("sm_90", 4, 64): Tiling(32, 32, 4, 2),
    ("sm_90", 4, 128): Tiling(16, 16, 8, 1, 64 * 1024),
    ("sm_90", 4, 256): Tiling(16, 16, 16, 1),
    ("sm_80", 2, 64): Tiling(32, 64, 4, 2, 64 * 1024),
    ("sm_80", 2, 128): Tiling(32, 32, 8, 1, 64 * 1024),
    ("sm_80", 2, 256): Tiling(32, 32, 8, 1, 64 * 1024),
    ("sm_100", 2, 128): Tiling(64, 64, 8, 1),
}
PADDED_TILINGS = {("sm_90", 2, 128): Tiling(32, 64, 4, 2)}
"""Instead of these, where a head is narrower than its tile: what says which channels exist takes registers."""
NUM_STAGES = 1


def forward(
    p: Tensor,
    z_before: Tensor | None,
    v_before: Tensor | None,
    ages: Tensor | None,
    chunk_lengths: Sequence[int],
    w0: Tensor | None,
    b0: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    beta: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    num_query_heads: int,
    num_key_heads: int,
    head_dim: int,
    kernel_sizes: tuple[int, int],
    use_qk_mean: bool,
    eps: float | None,
    value_shift: bool,
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Projection -> what attention takes.

    Args:
        p: [B, S, C + V], latent queries, latent keys and value channels side by side; its rows may stand apart.
        z_before, v_before: [B, chunks, k0 + k1 - 2, C] and [B, chunks, 1, V / 2], the rows before each chunk; None:
            zeros.
        ages: [B, S] int, rows of its document before each row; None: no document begins within the rows.
        chunk_lengths: local rows are these many runs of consecutive positions, one after another.
        w0, b0, w1, b1: [C, k0], [C], [Hq + Hk, k1 D, D], [Hq + Hk, D], the last tap that of the current row; None
            (all four) without convolutions.
        beta: [Hk] fp32, factor on the normalised keys; None: 1.
        cos, sin: [S, 1, half] fp32; None: no rotation.
        eps: added to a head's mean square; None: no norm.
        tiling: None takes that of ``TILINGS`` for the device.

    Returns:
        q [B, S, Hq, D], k and v [B, S, Hk, D] in p's dtype; inv [B, S, Hq + Hk] fp32, one over each head's root mean
        square (empty without norm).

    Raises:
        ValueError: a shape or device that the kernel does not take (``refuses``).
    """
    shape = Shape(num_query_heads, num_key_heads, head_dim, kernel_sizes, use_qk_mean, eps, value_shift)
    check(p, shape, tuple(chunk_lengths), cos)
    outputs = _outputs(p, shape)
    tensors = (p, z_before, v_before, ages, w0, b0, w1, b1, beta, cos, sin)
    tiling = tiling or _tiling(chip_of(p.device), p.dtype, head_dim)
    arguments, grid = _launch(tensors, outputs, chunk_lengths, shape, tiling)
    if p.shape[0] * p.shape[1]:
        with on_device(p.device):
            prologue[(grid,)](**arguments, num_warps=tiling.num_warps, num_stages=NUM_STAGES)
    return outputs


def specializations() -> list[Specialization]:
    """The variants for ``EXAMPLES``."""
    return [_specialization(example, chip) for example in EXAMPLES for chip in example.chips]


def _specialization(example: Example, chip: str) -> Specialization:
    shape, tensors = example.shape, list(example.tensors().values())
    tiling = _tiling(chip, example.dtype, shape.head_dim)
    assert tensors[0] is not None
    arguments, _ = _launch(tensors, _outputs(tensors[0], shape), example.chunk_lengths, shape, tiling)
    return of_launch(
        f"prologue forward: {example}",
        prologue,
        arguments,
        num_warps=tiling.num_warps,
        num_stages=NUM_STAGES,
        tensor_cores=example.dtype != torch.float32,
        chips=(chip,),
        routine=example.routine,
    )


def _tiling(chip: str, dtype: torch.dtype, head_dim: int) -> Tiling:
    width = padded(head_dim)
    other = PADDED_TILINGS.get((chip, dtype.itemsize, width)) if head_dim < width else None
    return other or tiling_for(TILINGS, chip, dtype, head_dim)


def _outputs(p: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = p.shape[:2]
    q = p.new_empty(*rows, shape.num_query_heads, shape.head_dim)
    k, v = (p.new_empty(*rows, shape.num_key_heads, shape.head_dim) for _ in range(2))
    inv = p.new_empty((*rows, shape.num_heads) if shape.eps is not None else 0, dtype=torch.float32)
    return q, k, v, inv


def _launch(
    tensors: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    chunk_lengths: Sequence[int],
    shape: Shape,
    tiling: Tiling,
) -> tuple[dict[str, Any], int]:
    """The kernel's arguments, and how many programs."""
    p, z_before, v_before, ages, *weights, beta, cos, sin = tensors
    assert p is not None
    if p.stride(-1) != 1:
        p = p.contiguous()
    rest = [None if x is None else x.contiguous() for x in (z_before, v_before, ages, *weights, beta, cos, sin)]
    group = shape.num_query_heads // shape.num_key_heads
    num_taps = sum(shape.kernel_sizes) - 1
    tiles = p.shape[0] * triton.cdiv(p.shape[1], tiling.rows)
    # Work in tiles that are read and written: the taps, then the own head and its partners for the mean.
    mean = 1 if shape.use_qk_mean else 0
    splits = deal(
        tiles,
        num_processors(p.device) * tiling.programs,
        (
            (shape.num_query_heads, num_taps + 1 + 2 * mean),
            (shape.num_key_heads, num_taps + 1 + (1 + group) * mean),
            (shape.num_key_heads, 2),
        ),
    )
    lanes = padded(shape.head_dim)
    # A tile of z for each tap is in registers at a time.
    channels = max(16, tiling.channels // triton.next_power_of_2(max(1, num_taps - 3)))
    half = 0 if cos is None else cos.shape[-1]
    names = ("z_before", "v_before", "ages", "w0", "b0", "w1", "b1", "beta", "cos", "sin")
    q, k, v, inv = outputs
    arguments = {
        "p": p,
        **dict(zip(names, rest, strict=True)),
        "q": q,
        "k": k,
        "v": v,
        "inv": None if shape.eps is None else inv,
        "batch_size": p.shape[0],
        "num_rows": p.shape[1],
        "first_chunk": chunk_lengths[0],
        "p_batch_stride": p.stride(0),
        "p_row_stride": p.stride(1),
        "eps": 0.0 if shape.eps is None else shape.eps,
        "query_splits": splits[0],
        "key_splits": splits[1],
        "value_splits": splits[2],
        "NUM_QUERY_HEADS": shape.num_query_heads,
        "NUM_KEY_HEADS": shape.num_key_heads,
        "D": shape.head_dim,
        "K0": shape.kernel_sizes[0],
        "K1": shape.kernel_sizes[1],
        "HALF": half,
        "MEAN": shape.use_qk_mean,
        "SHIFT": shape.value_shift,
        "ROWS": tiling.rows,
        "CHANNELS": channels,
        "BLOCKS": triton.cdiv(shape.head_dim, channels),
        "LANES": lanes,
        "RESIDENT": shape.kernel_sizes[1] * lanes * lanes * p.element_size() <= tiling.resident_bytes,
        "VALUES": max(16, triton.next_power_of_2(shape.head_dim // 2)),
    }
    programs = shape.num_query_heads * splits[0] + shape.num_key_heads * (splits[1] + splits[2])
    return arguments, programs


@triton.jit
def prologue(
    p,
    z_before,
    v_before,
    ages,
    w0,
    b0,
    w1,
    b1,
    beta,
    cos,
    sin,
    q,
    k,
    v,
    inv,
    batch_size,
    num_rows,
    first_chunk,
    p_batch_stride,
    p_row_stride,
    eps,
    query_splits,
    key_splits,
    value_splits,
    NUM_QUERY_HEADS: tl.constexpr,
    NUM_KEY_HEADS: tl.constexpr,
    D: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    HALF: tl.constexpr,
    MEAN: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    RESIDENT: tl.constexpr,
    VALUES: tl.constexpr,
):
    program = tl.program_id(0)
    keys = program - NUM_QUERY_HEADS * query_splits
    values = keys - NUM_KEY_HEADS * key_splits
    if keys < 0:
        head_rows(
            p, z_before, ages, w0, b0, w1, b1, beta, cos, sin, q, inv, batch_size, num_rows, first_chunk,
            p_batch_stride, p_row_stride, eps, program % NUM_QUERY_HEADS, program // NUM_QUERY_HEADS, query_splits,
            False, NUM_QUERY_HEADS, NUM_KEY_HEADS, D, K0, K1, HALF, MEAN, ROWS, CHANNELS, BLOCKS, LANES, RESIDENT,
        )  # fmt: skip
    elif values < 0:
        head_rows(
            p, z_before, ages, w0, b0, w1, b1, beta, cos, sin, k, inv, batch_size, num_rows, first_chunk,
            p_batch_stride, p_row_stride, eps, keys % NUM_KEY_HEADS, keys // NUM_KEY_HEADS, key_splits,
            True, NUM_QUERY_HEADS, NUM_KEY_HEADS, D, K0, K1, HALF, MEAN, ROWS, CHANNELS, BLOCKS, LANES, RESIDENT,
        )  # fmt: skip
    else:
        value_rows(
            p, v_before, ages, v, batch_size, num_rows, first_chunk, p_batch_stride, p_row_stride,
            values % NUM_KEY_HEADS, values // NUM_KEY_HEADS, value_splits,
            NUM_QUERY_HEADS, NUM_KEY_HEADS, D, SHIFT, ROWS, VALUES,
        )  # fmt: skip
