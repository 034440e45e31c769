"""A small GPT and the settings that its tests start from."""

from dataclasses import replace

import pytest

from hydra_dist.memory.megatron_settings import MegatronSettings
from hydra_dist.memory.shapes import DenseDecoder

GPT = DenseDecoder(
    num_layers=8,
    hidden_size=512,
    ffn_size=2048,
    num_query_heads=8,
    num_key_heads=8,
    head_dim=64,
    vocab_size=50257,
    max_positions=1024,
)
SETTINGS = MegatronSettings(sequence_length=1024, micro_batch_size=4, num_micro_batches=8)


@pytest.fixture
def gpt():
    """The model with some extents changed: gpt(num_layers=4)."""
    return lambda **changes: replace(GPT, **changes)


@pytest.fixture
def settings():
    """The settings with some changed: settings(tensor_parallel_size=2)."""
    return lambda **changes: replace(SETTINGS, **changes)
