"""Layers that the kernels of the CCGQA prologue are compiled for ahead of time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_dist.kernels.ccgqa_prologue_rows import Shape
from hydra_dist.kernels.specialization import CHIPS


@dataclass(frozen=True)
class Example:
    """A layer that the kernels are compiled for ahead of time."""

    dtype: torch.dtype
    shape: Shape
    half: int
    """Rotated pairs of channels of a head."""
    halo: bool
    """Two chunks with rows before each, instead of one with nothing before it."""
    documents: bool
    """More than one in the rows."""
    chips: tuple[str, ...]
    routine: bool
    """Whether every test run compiles it."""

    def __str__(self) -> str:
        shape, (k0, k1) = self.shape, self.shape.kernel_sizes
        dtype, heads = str(self.dtype).removeprefix("torch."), f"{shape.num_query_heads}+{shape.num_key_heads}"
        rows = "".join(f", {name}" for name in ("halo", "documents") if getattr(self, name)) or ", bare"
        return f"{dtype} {heads} heads of {shape.head_dim}, taps {k0} {k1}{rows}"

    @property
    def chunk_lengths(self) -> tuple[int, ...]:
        return (16_384, 16_384) if self.halo else (32_768,)

    def tensors(self) -> dict[str, Tensor | None]:
        """Inputs on the meta device."""
        shape, num_rows, num_chunks = self.shape, sum(self.chunk_lengths), len(self.chunk_lengths)
        C, D, (k0, k1) = shape.latent_size, shape.head_dim, shape.kernel_sizes

        def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device="meta")

        return {
            "p": empty(1, num_rows, C + shape.value_size, dtype=self.dtype),
            "z_before": empty(1, num_chunks, k0 + k1 - 2, C, dtype=self.dtype) if self.halo else None,
            "v_before": empty(1, num_chunks, 1, shape.value_size // 2, dtype=self.dtype) if self.halo else None,
            "ages": empty(1, num_rows, dtype=torch.int64) if self.documents else None,
            "w0": empty(C, k0),
            "b0": empty(C),
            "w1": empty(shape.num_heads, k1 * D, D),
            "b1": empty(shape.num_heads, D),
            "beta": empty(shape.num_key_heads),
            "cos": empty(num_rows, 1, self.half),
            "sin": empty(num_rows, 1, self.half),
        }


EXAMPLES = tuple(
    Example(dtype, Shape(*heads, head_dim, taps, True, 1e-14, True), half, *rows, chips, routine)
    for dtype, heads, head_dim, taps, half, rows, chips, routine in (
        (torch.bfloat16, (8, 2), 128, (2, 2), 32, (True, True), tuple(CHIPS), True),  # ZAYA1's layer
        (torch.bfloat16, (8, 2), 128, (2, 2), 32, (True, False), tuple(CHIPS), False),
        (torch.bfloat16, (8, 2), 128, (2, 2), 32, (False, True), tuple(CHIPS), False),
        (torch.bfloat16, (8, 2), 128, (2, 2), 32, (False, False), tuple(CHIPS), False),
        (torch.bfloat16, (4, 4), 128, (4, 3), 16, (True, True), tuple(CHIPS), False),
        (torch.bfloat16, (4, 4), 128, (4, 3), 16, (False, False), ("sm_90",), True),
        (torch.bfloat16, (4, 2), 256, (2, 2), 64, (True, True), tuple(CHIPS), False),
        (torch.bfloat16, (4, 2), 80, (2, 2), 20, (True, True), tuple(CHIPS), False),
        (torch.float16, (8, 2), 64, (2, 2), 16, (True, True), ("sm_90",), True),
        (torch.float32, (4, 2), 64, (2, 2), 16, (False, False), ("sm_90",), True),
        (torch.float32, (4, 2), 128, (2, 2), 32, (True, True), ("sm_80", "sm_90"), False),
    )
)
"""What the launchers come to that is worth compiling ahead of time."""
