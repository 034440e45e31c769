"""What the backward of the CCGQA prologue reads and writes, kernel by kernel, and what it needs besides its results.

Counted as if every tensor crossed the memory bus once for each kernel that uses it, and what is used again within a
range of rows (``ccgqa_prologue_ranges``) stayed in the L2 cache. A GPU's counters show more where a cache is too small.
"""

from dataclasses import dataclass

import torch

from hydra_dist.kernels.ccgqa_prologue_rows import Shape, padded
from hydra_dist.kernels.ccgqa_prologue_workspace import TILINGS, Tiling, Workspace

FP32 = 4
CACHED_BYTES = 32 * 2**20
"""Written by one kernel, these are still in an L2 cache of 50 MB when the next reads them."""


@dataclass(frozen=True)
class Traffic:
    """One tensor in one kernel."""

    kernel: str
    tensor: str
    read: int
    """Bytes, of all ranges together."""
    written: int
    in_cache: bool
    """Whether it is in the L2 cache where it is read; else it crosses the memory bus."""


def bound(shape: Shape, num_rows: int, element_size: int) -> int:
    """Bytes that any backward moves: z and the gradients of q, k and v read, that of the projection written."""
    return num_rows * element_size * (3 * shape.latent_size + 2 * shape.value_size)


def of_backward(
    shape: Shape, num_rows: int, dtype: torch.dtype, half: int, num_processors: int, tiling: Tiling | None = None
) -> tuple[Traffic, ...]:
    """The account of a layer with convolutions, mean and norm, on one document of one batch row.

    Args:
        half: rotated pairs of channels of a head.
        num_processors: of the GPU.
        tiling: None takes that of sm_90.
    """
    tiling = tiling or TILINGS["sm_90", dtype.itemsize, padded(shape.head_dim)]
    workspace = example(shape, num_rows, dtype, tiling)
    latent, values = (num_rows * size * dtype.itemsize for size in (shape.latent_size, shape.value_size))
    scalars = num_rows * FP32 * (shape.num_heads + 2 * half)
    ranges, cached = len(workspace.ranges), workspace.dy.nbytes <= CACHED_BYTES
    taps = sum(shape.kernel_sizes) - 1
    # Every program leaves a block of each tap; a range reads what the one before it has left.
    programs = num_processors * tiling.programs
    x_parts = programs * taps * workspace.channels * shape.head_dim * FP32
    assert workspace.b1_parts is not None
    b1_parts = workspace.b1_parts.nbytes
    return (
        Traffic("norm", "gradients of q and k", latent, 0, False),
        Traffic("norm", "q and k", latent, 0, False),
        Traffic("norm", "values", values, values, False),
        Traffic("norm", "norm's factors and rotation", scalars, 0, False),
        Traffic("norm", "dy", 0, latent, cached),
        Traffic("norm", "sums for b1", (ranges - 1) * b1_parts, ranges * b1_parts, ranges > 1),
        Traffic("convolutions", "dy", latent, 0, cached),
        Traffic("convolutions", "z and its gradient", latent, latent, False),
        Traffic("convolutions", "sums for the weights", (ranges - 1) * x_parts, ranges * x_parts, False),
        Traffic("weights", "sums for the weights", x_parts, 0, False),
        Traffic("weights", "sums for b1", b1_parts, 0, ranges > 1),
    )


def memory_bytes(account: tuple[Traffic, ...]) -> int:
    """What crosses the memory bus."""
    return sum(traffic.read + traffic.written for traffic in account if not traffic.in_cache)


def temporary_bytes(workspace: Workspace) -> int:
    """Memory that a backward takes besides its inputs and results."""
    own = [workspace.dy] if workspace.dy is not workspace.grad_p else []
    parts = (workspace.b1_parts, workspace.beta_parts, workspace.x_parts)
    return sum(x.nbytes for x in (*own, *(part for part in parts if part is not None)))


def example(shape: Shape, num_rows: int, dtype: torch.dtype, tiling: Tiling | None = None) -> Workspace:
    """A backward of one document of one batch row, on the meta device."""
    C, D, (k0, k1) = shape.latent_size, shape.head_dim, shape.kernel_sizes
    p = torch.empty(1, num_rows, C + shape.value_size, dtype=dtype, device="meta")
    w0, w1, beta = (
        torch.empty(*sizes, device="meta") for sizes in ((C, k0), (shape.num_heads, k1 * D, D), (shape.num_key_heads,))
    )
    return Workspace(p, None, None, None, w0, w1, beta, (num_rows,), shape, tiling)
