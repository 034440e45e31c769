"""What the tests of the model share: one thread, random weights, and small configurations."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from hydra_dist.config import ModelConfig


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def randomize() -> Callable[[nn.Module], nn.Module]:
    """Every parameter random and of ordinary size, biases and temperatures included, in fp64."""

    def fill(module: nn.Module, scale: float = 0.5) -> nn.Module:
        generator = torch.Generator().manual_seed(7)
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
        return module

    return fill


@pytest.fixture
def model_config() -> Callable[..., ModelConfig]:
    """A model small enough for a test, with what is given changed."""

    def build(**changes: object) -> ModelConfig:
        settings: dict[str, object] = {
            "vocab_size": 37,
            "num_layers": 2,
            "hidden_size": 24,
            "head_dim": 8,
            "num_query_heads": 4,
            "num_key_heads": 2,
        }
        return ModelConfig.model_validate({**settings, **changes})

    return build


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """max|a - b| / max|b|"""

    def measure(a: Tensor, b: Tensor) -> float:
        assert a.shape == b.shape
        a, b = a.detach(), b.detach()
        return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))

    return measure
