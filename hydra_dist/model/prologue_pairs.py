"""The CCGQA prologue over more runs of rows than its kernels take: two runs at a time.

A balanced layout may deal a rank more than two runs of consecutive positions. A run reads nothing of another one (what
stands before it comes as a halo), so pairs of runs are computed one after another and laid side by side.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

AT_ONCE = 2
"""Runs."""


@dataclass(frozen=True)
class _Part:
    """Some runs of the local rows."""

    rows: slice
    runs: slice
    lengths: list[int]

    def rows_of(self, x: Tensor | None, dim: int = 1) -> Tensor | None:
        """Its rows of a tensor; what has none stays as it is."""
        if x is None or x.dim() <= dim:
            return x
        return x[(slice(None),) * dim + (self.rows,)]

    def runs_of(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, self.runs]


def forward(
    compute: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
    p: Tensor,
    z_before: Tensor | None,
    v_before: Tensor | None,
    ages: Tensor | None,
    chunk_lengths: Sequence[int],
    weights: Sequence[Tensor | None],
    cosines: Tensor | None,
    sines: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and inv of all runs; ``compute`` takes the arguments from p on, for a few runs."""
    found = []
    for part in _parts(chunk_lengths):
        rows = (part.rows_of(p), part.runs_of(z_before), part.runs_of(v_before), part.rows_of(ages), part.lengths)
        found.append(compute(*rows, *weights, part.rows_of(cosines, 0), part.rows_of(sines, 0)))
    q, k, v, inv = (torch.cat(rows, 1) if rows[0].dim() > 1 else rows[0] for rows in zip(*found, strict=True))
    return q, k, v, inv


def backward(
    compute: Callable[..., Sequence[Tensor | None]],
    of_rows: Sequence[Tensor],
    z_before: Tensor | None,
    v_before: Tensor | None,
    ages: Tensor | None,
    chunk_lengths: Sequence[int],
    weights: Sequence[Tensor | None],
    cosines: Tensor | None,
    sines: Tensor | None,
) -> list[Any]:
    """Gradients of p, z_before, v_before and then of weights, which add up in the order of the runs.

    Args:
        compute: takes the arguments from ``of_rows`` on, for a few runs.
        of_rows: grad_q, grad_k, grad_v, q, k, inv and p.
    """
    found = []
    for part in _parts(chunk_lengths):
        rows = (part.runs_of(z_before), part.runs_of(v_before), part.rows_of(ages), part.lengths)
        tables = (part.rows_of(cosines, 0), part.rows_of(sines, 0))
        found.append(compute(*(part.rows_of(x) for x in of_rows), *rows, *weights, *tables))
    of_p, *of_weights = zip(*found, strict=True)
    halos, sums = of_weights[:2], of_weights[2:]
    whole: list[Any] = [torch.cat(of_p, 1)]
    whole += [None if parts[0] is None else torch.cat(parts, 1) for parts in halos]
    return whole + [None if parts[0] is None else torch.stack(parts).sum(0) for parts in sums]


def _parts(chunk_lengths: Sequence[int]) -> Iterator[_Part]:
    row = 0
    for first in range(0, len(chunk_lengths), AT_ONCE):
        lengths = list(chunk_lengths[first : first + AT_ONCE])
        yield _Part(slice(row, row + sum(lengths)), slice(first, first + len(lengths)), lengths)
        row += sum(lengths)
