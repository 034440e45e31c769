"""The value shift of CCGQA: the second half of the value channels is that of the row before.

Zero at a document's first row. With an odd number of key heads the cut goes through the middle of a head.

Source: Figliolia et al. 2025 (arXiv 2510.04476), section III.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def shift(values: Tensor, before: Tensor | None, ages: Tensor | None, chunk_lengths: Sequence[int]) -> Tensor:
    """A new tensor with the second half one row late.

    Args:
        values: [B, S, V].
        before: [B, chunks, 1, V / 2], that half of the row before each chunk; None: zeros.
        ages: [B, S] int, rows of its document before each row; None: no document begins within the rows.
        chunk_lengths: local rows are these many runs of consecutive positions, one after another.
    """
    shifted = values.clone(memory_format=torch.contiguous_format)
    half, first = values.shape[-1] // 2, 0
    late = shifted[..., half:]
    for chunk, length in enumerate(chunk_lengths):
        late[:, first + 1 : first + length] = values[:, first : first + length - 1, half:]
        late[:, first] = 0.0 if before is None else before[:, chunk, 0]
        first += length
    if ages is not None:
        late.masked_fill_((ages == 0).unsqueeze(-1), 0.0)
    return shifted


def shift_backward(
    grad: Tensor, grad_values: Tensor, before: Tensor | None, ages: Tensor | None, chunk_lengths: Sequence[int]
) -> Tensor | None:
    """From the gradient [B, S, V] of what ``shift`` gave, write that of its values; returns that of ``before``."""
    half, first = grad.shape[-1] // 2, 0
    grad_values[..., :half] = grad[..., :half]
    grad_before = None if before is None else torch.zeros_like(before)
    late = grad[..., half:]
    if ages is not None:
        late = late.masked_fill((ages == 0).unsqueeze(-1), 0.0)
    for chunk, length in enumerate(chunk_lengths):
        grad_values[:, first : first + length - 1, half:] = late[:, first + 1 : first + length]
        grad_values[:, first + length - 1, half:] = 0.0
        if grad_before is not None:
            grad_before[:, chunk, 0] = late[:, first]
        first += length
    return grad_before
