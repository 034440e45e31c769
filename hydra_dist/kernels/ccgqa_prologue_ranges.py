"""Ranges of rows that the backward of the CCGQA prologue goes over one after the other.

What one kernel leaves for the next (the gradients behind norm and rotation) is as large as the latent itself. Cut into
ranges it takes a buffer of a fixed size, used again for every range, and is still in the L2 cache when it is read.
"""

from dataclasses import dataclass

import triton
from torch import Tensor


@dataclass(frozen=True)
class RowRange:
    """Rows ``first`` to ``stop`` of a few batch rows."""

    first_batch: int
    stop_batch: int
    first: int
    stop: int
    adds: bool
    """Whether ranges before it have left sums, to which its own are added."""

    @property
    def batch_size(self) -> int:
        return self.stop_batch - self.first_batch

    def batch_of(self, x: Tensor | None) -> Tensor | None:
        """Its batch rows of a tensor [B, ...]."""
        return None if x is None else x[self.first_batch : self.stop_batch]


def cut(batch_size: int, num_rows: int, row_bytes: int, limit: int, multiple: int) -> tuple[RowRange, ...]:
    """Ranges of nearly equal size that together are all rows.

    Args:
        row_bytes: that a row takes.
        limit: bytes of a range. One of ``multiple`` rows may be larger.
        multiple: of rows in a range that ends before the last row.
    """
    if num_rows * row_bytes <= limit:
        together = max(1, limit // max(1, num_rows * row_bytes))
        together = triton.cdiv(batch_size, triton.cdiv(batch_size, together))
        spans = [(b, min(b + together, batch_size), 0, num_rows) for b in range(0, batch_size, together)]
    else:
        rows = max(1, limit // row_bytes // multiple) * multiple
        rows = triton.cdiv(triton.cdiv(num_rows, triton.cdiv(num_rows, rows)), multiple) * multiple
        spans = [
            (b, b + 1, first, min(first + rows, num_rows))
            for b in range(batch_size)
            for first in range(0, num_rows, rows)
        ]
    return tuple(RowRange(*span, adds=index > 0) for index, span in enumerate(spans))
