"""Which implementation is taken, and what is said where none can be."""

import pytest
import torch

from hydra_dist.attention import backends
from hydra_dist.attention.backends import LARGEST_SPAN_PAIRS, choose, resolve
from hydra_dist.errors import ConfigError

CPU, META = torch.device("cpu"), torch.device("meta")


def test_names():
    assert backends() == ("flash", "reference")
    assert all(resolve(name, CPU, torch.float32, 16).name == name for name in backends())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_auto_takes_flash_where_it_can(dtype):
    chosen, why = choose("auto", CPU, dtype, 16)
    assert chosen.name == "flash"
    assert str(dtype) in why


def test_auto_says_what_it_passed_over():
    chosen, why = choose("auto", META, torch.float32, 16)
    assert chosen.name == "reference"
    assert "not flash (PyTorch has no flash operator" in why
    chosen, why = choose("auto", CPU, torch.float32, 16, LARGEST_SPAN_PAIRS + 1)
    assert chosen.name == "reference"
    assert "scattered" in why
    assert choose("auto", CPU, torch.float32, 16, LARGEST_SPAN_PAIRS)[0].name == "flash"


def test_what_is_asked_for_is_not_replaced():
    assert choose("flash", CPU, torch.float32, 16, LARGEST_SPAN_PAIRS + 1)[0].name == "flash"
    with pytest.raises(ConfigError, match=r'"flash" cannot be used here: .* meta; reference works'):
        resolve("flash", META, torch.float32, 16)


@pytest.mark.parametrize(
    ("name", "hint"), [("Flash", '"flash"'), ("referense", '"reference"'), ("automatic", '"auto"')]
)
def test_unknown_names(name, hint):
    with pytest.raises(ConfigError, match=f"known are auto, flash, reference.*{hint}"):
        resolve(name, CPU, torch.float32, 16)


def test_dtypes_that_nothing_takes():
    with pytest.raises(ConfigError, match="no attention backend takes this"):
        resolve("auto", CPU, torch.float8_e4m3fn, 16)
    with pytest.raises(ConfigError, match="cannot be used here"):
        resolve("reference", CPU, torch.int32, 16)
