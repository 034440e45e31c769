"""What the kernels of the CCGQA prologue's backward share: inputs, tilings, and what they write for each other."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from hydra_dist.kernels.ccgqa_prologue_examples import Example
from hydra_dist.kernels.ccgqa_prologue_ranges import RowRange, cut
from hydra_dist.kernels.ccgqa_prologue_rows import Shape, chip_of, deal, num_processors, tiling_for


@dataclass(frozen=True)
class Tiling:
    """How the kernels are cut."""

    norm_rows: int
    """Of a tile on the way through the norm."""
    rows: int
    """Of a tile on the way through the convolutions."""
    channels: int
    """Input channels of a head that a program then owns, with 3 taps; with more taps it owns fewer."""
    num_warps: int
    num_stages: int
    programs: int
    """That a multiprocessor then runs at a time."""
    tight_rows: int | None = None
    """``rows`` where registers are short: with rows before the chunks, or more than 3 taps. None: as many."""
    dy_bytes: int = 24 * 2**20
    """Of the gradients behind the norm that are kept at a time, about half of the L2 cache."""


TILINGS = {
    # Chip, bytes of an element, padded head_dim; other chips than sm_90 differ where they are named. Chosen by what the
    # compiler says of registers and shared memory, not by measured times.
    ("sm_90", 2, 16): Tiling(64, 64, 16, 4, 1, 4),
    ("sm_90", 2, 32): Tiling(64, 64, 32, 4, 1, 4),
    ("sm_90", 2, 64): Tiling(64, 64, 32, 4, 2, 2),
    ("sm_90", 2, 128): Tiling(32, 64, 64, 8, 2, 1, tight_rows=32),
    ("sm_90", 2, 256): Tiling(16, 32, 16, 8, 1, 1),
    ("sm_90", 4, 16): Tiling(64, 16, 16, 4, 1, 4),
    ("sm_90", 4, 32): Tiling(64, 16, 16, 4, 1, 4),
    ("sm_90", 4, 64): Tiling(32, 16, 16, 4, 1, 2),
    ("sm_90", 4, 128): Tiling(32, 16, 16, 8, 1, 1),
    ("sm_90", 4, 256): Tiling(16, 16, 16, 16, 1, 1),
    ("sm_80", 2, 64): Tiling(64, 32, 32, 4, 1, 2),
    ("sm_80", 2, 128): Tiling(32, 32, 32, 8, 1, 1),
    ("sm_100", 2, 128): Tiling(32, 64, 64, 8, 1, 1),
}


class Workspace:
    """One backward: its inputs as the kernels take them, and its results."""

    def __init__(
        self,
        p: Tensor,
        z_before: Tensor | None,
        v_before: Tensor | None,
        ages: Tensor | None,
        w0: Tensor | None,
        w1: Tensor | None,
        beta: Tensor | None,
        chunk_lengths: tuple[int, ...],
        shape: Shape,
        tiling: Tiling | None,
    ) -> None:
        self.p = p if p.stride(-1) == 1 else p.contiguous()
        self.z_before, self.v_before, self.ages, self.w0, self.w1, self.beta = (
            None if x is None else x.contiguous() for x in (z_before, v_before, ages, w0, w1, beta)
        )
        if tiling is None:
            tiling = tiling_for(TILINGS, chip_of(p.device), p.dtype, shape.head_dim)
        self.chunk_lengths, self.shape, self.tiling = chunk_lengths, shape, tiling
        self.needs_second = w1 is not None or shape.use_qk_mean
        self.ranges = self._ranges()
        largest = max(self.ranges, key=lambda rows: rows.batch_size * (rows.stop - rows.first), default=None)
        self.dy_rows = 0 if largest is None else min(largest.stop - largest.first + self.num_after, p.shape[1])
        dy_batch = 0 if largest is None else largest.batch_size
        self.norm_tiles = dy_batch * triton.cdiv(self.dy_rows, tiling.norm_rows)
        heads, D, (k0, k1) = shape.num_heads, shape.head_dim, shape.kernel_sizes
        self.grad_p = p.new_empty(p.shape)
        self.grad_z_before = (
            None if z_before is None else torch.zeros_like(z_before, memory_format=torch.contiguous_format)
        )
        self.grad_v_before = (
            None if v_before is None else torch.zeros_like(v_before, memory_format=torch.contiguous_format)
        )
        self.dy = p.new_empty(dy_batch, self.dy_rows, shape.latent_size) if self.needs_second else self.grad_p
        self.splits = self._splits(dy_batch)
        self.num_parts = shape.num_query_heads * self.splits[0] + shape.num_key_heads * self.splits[1]
        has_taps, has_beta = w1 is not None, beta is not None and shape.eps is not None
        self.b1_parts = self.empty(self.norm_tiles, heads, D) if has_taps else None
        self.beta_parts = self.empty(self.norm_tiles, shape.num_key_heads) if has_beta else None
        self.x_parts = self.empty(self.num_parts, k0 + k1 - 1, D, D) if has_taps else None

    def empty(self, *sizes: int) -> Tensor:
        """In fp32."""
        return torch.empty(*sizes, dtype=torch.float32, device=self.p.device)

    @property
    def rows(self) -> int:
        """Of a tile of the second kernel."""
        tight = self.z_before is not None or sum(self.shape.kernel_sizes) - 1 > 3
        return (tight and self.tiling.tight_rows) or self.tiling.rows

    @property
    def channels(self) -> int:
        """Input channels that a program of the second kernel owns; its sums are as large whatever the taps."""
        taps = sum(self.shape.kernel_sizes) - 1
        return max(16, self.tiling.channels // triton.next_power_of_2(triton.cdiv(taps, 3)))

    @property
    def num_stages(self) -> int:
        """Pipelining keeps a tile of every tap in shared memory, which has room for 3."""
        return self.tiling.num_stages if sum(self.shape.kernel_sizes) - 1 <= 3 else 1

    @property
    def blocks(self) -> int:
        """Programs that a head's channels are divided among."""
        return triton.cdiv(self.shape.head_dim, self.channels)

    @property
    def num_after(self) -> int:
        """Rows of dy behind a range that its convolutions read."""
        return sum(self.shape.kernel_sizes) - 2

    def _ranges(self) -> tuple[RowRange, ...]:
        batch_size, num_rows = self.p.shape[:2]
        if not batch_size * num_rows:
            return ()
        tiling, row_bytes = self.tiling, self.shape.latent_size * self.p.element_size()
        limit = tiling.dy_bytes if self.needs_second else batch_size * num_rows * row_bytes
        return cut(batch_size, num_rows, row_bytes, limit, max(16, tiling.norm_rows, tiling.rows))

    def _splits(self, batch_size: int) -> tuple[int, ...]:
        """How many programs share a range's rows of a block of a query head, and of a key head."""
        shape, tiling = self.shape, self.tiling
        taps = sum(shape.kernel_sizes) - 1
        rows_before = 0 if self.z_before is None else taps - 1
        rows = self.dy_rows + len(self.chunk_lengths) * rows_before
        # Work in tiles of the block's channels: a tap of dy is as wide as the head.
        work = 2 + taps * self.blocks
        mean = 1 if shape.use_qk_mean else 0
        group = shape.num_query_heads // shape.num_key_heads
        columns = (
            (shape.num_query_heads * self.blocks, work + 2 * mean),
            (shape.num_key_heads * self.blocks, work + (1 + group) * mean),
        )
        tiles = batch_size * triton.cdiv(rows, self.rows)
        return deal(max(1, tiles), num_processors(self.p.device) * tiling.programs, columns)

    def rows_of(self, rows: RowRange) -> dict[str, Any]:
        """Arguments that say to the first two kernels which rows they take."""
        return {
            "num_rows": self.p.shape[1],
            "first_chunk": self.chunk_lengths[0],
            "first_row": rows.first,
            "stop_row": rows.stop,
            "dy_rows": self.dy.shape[1],
            "adds": rows.adds,
        }

    def heads_and_taps(self) -> dict[str, int]:
        """Arguments that two of the kernels have in common."""
        shape = self.shape
        return {
            "query_splits": self.splits[0],
            "key_splits": self.splits[1],
            "NUM_QUERY_HEADS": shape.num_query_heads,
            "NUM_KEY_HEADS": shape.num_key_heads,
            "D": shape.head_dim,
            "K0": shape.kernel_sizes[0],
            "K1": shape.kernel_sizes[1],
        }


def example_workspace(example: Example, chip: str) -> tuple[Workspace, tuple[Any, ...]]:
    """A backward on the meta device, cut for a chip, and the other inputs of its first kernel."""
    x, shape = example.tensors(), example.shape
    tiling = tiling_for(TILINGS, chip, example.dtype, shape.head_dim)
    p, z_before, v_before, ages, w0, w1, beta = (
        x[name] for name in ("p", "z_before", "v_before", "ages", "w0", "w1", "beta")
    )
    assert p is not None
    q = p.new_empty(*p.shape[:2], shape.num_query_heads, shape.head_dim)
    k = p.new_empty(*p.shape[:2], shape.num_key_heads, shape.head_dim)
    inv = p.new_empty(*p.shape[:2], shape.num_heads, dtype=torch.float32)
    workspace = Workspace(p, z_before, v_before, ages, w0, w1, beta, example.chunk_lengths, shape, tiling)
    return workspace, ((q, k, k), q, k, inv, x["cos"], x["sin"])
