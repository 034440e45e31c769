"""What the tests of attention share: inputs, a comparison, and the masks that every path is tried with."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hydra_dist.attention import Mask


@pytest.fixture
def difference() -> Callable[[Tensor, Tensor], float]:
    """max|a - b| / max|b|. Where b is zero but for rounding, the inputs' own size of 1 takes its place."""

    def of(a: Tensor, b: Tensor) -> float:
        assert a.shape == b.shape
        assert bool(torch.isfinite(a).all())
        largest = b.abs().max().item()
        return (a.double() - b.double()).abs().max().item() / (largest if largest > 1e-6 else 1.0)

    return of


@pytest.fixture
def inputs() -> Callable[..., list[Tensor]]:
    """q, k, v and the gradient of out."""

    def make(
        batch_size: int = 2,
        q_length: int = 33,
        k_length: int | None = None,
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 16,
        dtype: torch.dtype = torch.float64,
    ) -> list[Tensor]:
        k_length = q_length if k_length is None else k_length
        shapes = [(q_length, heads[0]), (k_length, heads[1]), (k_length, heads[1]), (q_length, heads[0])]
        return [torch.randn(batch_size, length, count, head_dim, dtype=dtype) for length, count in shapes]

    return make


def packed(lengths: list[int]) -> Tensor:
    """[1, S]: the document start of each row, for documents of such lengths."""
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    return starts.repeat_interleave(torch.tensor(lengths)).unsqueeze(0)


LENGTH = 97
MASKS = {
    "causal": Mask(),
    "full": Mask(causal=False),
    "window 1": Mask(window=1),
    "window 3": Mask(window=3),
    "window 64": Mask(window=64),
    "window beyond the sequence": Mask(window=LENGTH + 3),
    "documents": Mask(document_starts=packed([1, 40, 1, 1, 30, 24])),
    "documents, full": Mask(causal=False, document_starts=packed([1, 40, 1, 1, 30, 24])),
    "documents, window": Mask(window=3, document_starts=packed([1, 40, 1, 1, 30, 24])),
    "documents per batch row": Mask(document_starts=torch.cat([packed([1, 40, 1, 1, 30, 24]), packed([96, 1])])),
}


@pytest.fixture(params=list(MASKS))
def mask(request: pytest.FixtureRequest) -> Mask:
    """A mask for sequences of 97 rows, with at most 2 batch rows."""
    return MASKS[request.param]
