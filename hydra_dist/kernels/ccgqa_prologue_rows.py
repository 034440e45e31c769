"""What the kernels of the CCGQA prologue share: where rows stand, how a head is cut, how the work is dealt.

A rotation turns channel i of a head with channel i + half. A program therefore holds a head as pairs of channels, one
side of every pair in each of two tiles. The rotation is then plain arithmetic on two tiles, and no channel moves from
thread to thread. Channels that are not rotated make up pairs as well.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment,misc,var-annotated"

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydra_dist.kernels.specialization import CHIPS

TilingType = TypeVar("TilingType")
INTERPRETED = triton.knobs.runtime.interpret
"""Whether Triton runs the kernels as NumPy code on CPU tensors (TRITON_INTERPRET=1)."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
MAX_CHUNKS = 2
"""Runs of consecutive positions in the local rows: one on one device, two where a rank holds two ends (zigzag)."""


@dataclass(frozen=True)
class Shape:
    """What a layer computes; Hq query and Hk key heads of D channels, C = (Hq + Hk) D, V = Hk D."""

    num_query_heads: int
    num_key_heads: int
    head_dim: int
    kernel_sizes: tuple[int, int]
    """Taps k0 and k1 of the depthwise and the grouped convolution; (1, 1) without convolutions."""
    use_qk_mean: bool
    eps: float | None
    """Added to a head's mean square; None: no norm."""
    value_shift: bool

    @property
    def num_heads(self) -> int:
        return self.num_query_heads + self.num_key_heads

    @property
    def latent_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def value_size(self) -> int:
        return self.num_key_heads * self.head_dim


def refuses(
    device: torch.device, dtype: torch.dtype, head_dim: int, kernel_sizes: tuple[int, int] = (1, 1), num_chunks: int = 1
) -> str | None:
    """Why the kernels cannot take a prologue, in words for whoever chose it; None: they can.

    Args:
        dtype: of the projection.
        kernel_sizes: k0 and k1.
        num_chunks: runs of consecutive positions in the local rows.
    """
    if INTERPRETED:
        if dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 wrongly; float32 and float16 work in it"
    elif device.type != "cuda":
        return f"the Triton kernels need a CUDA device, not {device.type}"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need compute capability 8.0 (Ampere) or later"
    if dtype not in DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        return f"the Triton kernels take an even head_dim up to {MAX_HEAD_DIM}, not {head_dim}"
    if min(kernel_sizes) < 1:
        return f"conv_kernel_sizes {tuple(kernel_sizes)} is not two positive numbers"
    if not 1 <= num_chunks <= MAX_CHUNKS:
        return f"the Triton kernels take rows in 1 or {MAX_CHUNKS} runs of consecutive positions, not {num_chunks}"
    if not INTERPRETED and dtype == torch.float32:
        # The compiler does not fit the backward of wider heads into registers.
        largest = 64 if torch.cuda.get_device_capability(device) >= (10, 0) else 128
        if head_dim > largest:
            return f"the Triton kernels take fp32 heads up to {largest} on this chip, not {head_dim}"
    return None


def check(p: Tensor, shape: Shape, chunk_lengths: tuple[int, ...], cos: Tensor | None) -> None:
    """Raise ValueError for what the launchers were not made for."""
    reason = refuses(p.device, p.dtype, shape.head_dim, shape.kernel_sizes, len(chunk_lengths))
    if reason is not None:
        raise ValueError(reason)
    if shape.num_query_heads % shape.num_key_heads:
        raise ValueError(f"{shape.num_query_heads} query heads are no multiple of {shape.num_key_heads} key heads")
    width = shape.latent_size + shape.value_size
    if p.shape[-1] != width:
        raise ValueError(f"the projection has {p.shape[-1]} channels; {width} follow from the heads")
    if sum(chunk_lengths) != p.shape[1]:
        raise ValueError(f"chunk_lengths {chunk_lengths} do not add up to {p.shape[1]} rows")
    if cos is not None and 2 * cos.shape[-1] > shape.head_dim:
        raise ValueError(f"a rotation of 2 x {cos.shape[-1]} channels does not fit into head_dim {shape.head_dim}")


def padded(width: int) -> int:
    """The least power of two that a tile of ``width`` channels fits into; a matrix product takes 16 at least."""
    return max(16, triton.next_power_of_2(width))


def num_processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; where there is none, few enough for a program to get several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def deal(num_tiles: int, num_programs: int, columns: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """Into how many programs the rows of each kind of column are split, so that all programs have alike to do.

    Args:
        num_tiles: row tiles that each column consists of.
        num_programs: that run at a time.
        columns: (how many columns, work of one tile) of each kind.
    """
    total = sum(count * work for count, work in columns)
    return tuple(min(num_tiles, max(1, num_programs * work // total)) for _, work in columns)


def chip_of(device: torch.device) -> str:
    """The key of ``CHIPS`` whose tiling a device gets: its own, or that which needs the least shared memory."""
    if device.type != "cuda":
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    own = f"sm_{major}{minor}"
    return own if own in CHIPS else "sm_80"


def tiling_for(
    table: Mapping[tuple[str, int, int], TilingType], chip: str, dtype: torch.dtype, head_dim: int
) -> TilingType:
    """The tiling of a chip; where the table has none for it, that of sm_90."""
    size = dtype.itemsize, padded(head_dim)
    return table.get((chip, *size)) or table["sm_90", *size]


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@triton.jit
def locate(tile, tiles_per_batch, start, stop, num_rows, first_chunk, BEFORE: tl.constexpr, ROWS: tl.constexpr):
    """Where the rows of a tile stand; ``BEFORE`` rows in front of each chunk count as rows.

    Tiles begin at row ``start`` of each batch row, and rows from ``stop`` on do not exist (both counted with the rows
    in front).

    Returns the batch row, a local row (both one number of 64 bits), the tile's local rows counted from that one (32
    bits), each row's chunk, its offset in it (negative for rows before it), the chunk's rows, and which rows exist.
    """
    batch = (tile // tiles_per_batch).to(tl.int64)
    first = start + (tile % tiles_per_batch) * ROWS
    index = first + tl.arange(0, ROWS)
    second = index >= first_chunk + BEFORE
    offset = tl.where(second, index - first_chunk - BEFORE, index) - BEFORE
    length = tl.where(second, num_rows - first_chunk, first_chunk)
    near = tl.where(second, first_chunk, 0) + offset - first
    exists = index < stop
    return batch, first.to(tl.int64), near, second.to(tl.int32), offset, length, exists


@triton.jit
def index_of(row, num_rows, first_chunk, BEFORE: tl.constexpr):
    """Local row ``row`` counted with the ``BEFORE`` rows in front of each chunk; 0 and ``num_rows`` are the ends."""
    chunks = tl.where(first_chunk < num_rows, 2, 1)
    inner = row + BEFORE * tl.where(row < first_chunk, 1, 2)
    return tl.where(row == 0, 0, tl.where(row == num_rows, num_rows + BEFORE * chunks, inner))


@triton.jit
def rows_at(base, first, near, stride):
    """Pointers to rows ``first`` (one number of 64 bits) + ``near`` (a tile's, 32 bits), ``stride`` elements apart."""
    return base + first * stride + near * stride


@triton.jit
def row_before(z_before, batch, chunk, offset, num_rows, first_chunk, BEFORE: tl.constexpr, C: tl.constexpr):
    """Pointers to the rows of z_before [B, chunks, BEFORE, C] at negative offsets (others: somewhere in it)."""
    num_chunks = tl.where(first_chunk < num_rows, 2, 1)
    return z_before + batch * num_chunks * (BEFORE * C) + (chunk * BEFORE + BEFORE + tl.minimum(offset, -1)) * C


@triton.jit
def begins_a_chunk(
    tile, tiles_per_batch, start, num_rows, first_chunk, BEFORE: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr
):
    """Whether a tile (of ``locate``, with the same start and BEFORE) has rows among the first ``FIRST`` of a chunk: one
    number, by which all but a few tiles skip what only those rows need."""
    index = start + (tile % tiles_per_batch) * ROWS
    second = first_chunk + BEFORE
    return (index < FIRST) | ((first_chunk < num_rows) & (index < second + FIRST) & (index + ROWS > second))


@triton.jit
def channel_of(pair, side, HALF: tl.constexpr, D: tl.constexpr):
    """The channel of a head that stands on one side (0 or 1) of a pair."""
    turned = pair + side * HALF
    rest = pair + HALF + side * (D // 2 - HALF)
    return tl.where(pair < HALF, turned, rest)


@triton.jit
def rotated(first, second, cos, sin, row, near, exists, HALF: tl.constexpr, PAIRS: tl.constexpr, BACK: tl.constexpr):
    """Turn the pairs (first, second) of each row by its angles, or back; pairs from HALF on stay as they are."""
    pair = tl.arange(0, PAIRS)
    turns = exists[:, None] & (pair < HALF)[None, :]
    cosines = tl.load(rows_at(cos, row, near, HALF)[:, None] + pair[None, :], mask=turns, other=1.0)
    sines = tl.load(rows_at(sin, row, near, HALF)[:, None] + pair[None, :], mask=turns, other=0.0)
    if BACK:
        sines = -sines
    return first * cosines - second * sines, second * cosines + first * sines


@triton.jit
def transposed_tap(w1, head, inputs, DELAY: tl.constexpr, D: tl.constexpr, K1: tl.constexpr, LANES: tl.constexpr):
    """One tap of w1, transposed, [D out, channels] in fp32."""
    outputs = tl.arange(0, LANES)
    row = head.to(tl.int64) * (K1 * D) + (K1 - 1 - DELAY) * D + inputs
    inside = (outputs < D)[:, None] & (inputs < D)[None, :]
    return tl.load(w1 + row[None, :] * D + outputs[:, None], mask=inside, other=0.0).to(tl.float32)
