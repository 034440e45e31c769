"""Counted operations against torch's counter on the real model, where that counts, and against plain counting."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hydra_dist.config import ModelConfig
from hydra_dist.costs.flops import forward_flops, mfu, peak_flops, score_pairs, training_flops_per_token
from hydra_dist.model import Transformer, initialize

BASE = {"vocab_size": 51, "num_layers": 2, "hidden_size": 40, "head_dim": 8, "num_query_heads": 4, "num_key_heads": 2}
TOKENS = 24


def counted(config, backward):
    """Of matrix products: all but attention (one operator of ours) and the depthwise taps (elementwise)."""
    model = Transformer(config, loss_chunk_size=TOKENS)
    initialize(model, 0)
    tokens = torch.randint(0, 51, (1, TOKENS))
    with FlopCounterMode(display=False) as counter:
        if backward:
            model(tokens, targets=tokens).backward()
        else:
            with torch.no_grad():
                model(tokens)
    return counter.get_total_flops()


def depthwise(config):
    if config.attention == "gqa" or not config.use_convs:
        return 0
    return config.num_layers * 2 * (config.query_size + config.key_size) * config.conv_kernel_sizes[0]


@pytest.mark.parametrize(
    "changes",
    [{}, {"attention": "gqa"}, {"use_convs": False}, {"conv_kernel_sizes": (3, 4)}, {"tie_embeddings": False}],
    ids=str,
)
def test_forward_and_training_match_the_counter(changes):
    config = ModelConfig.model_validate({**BASE, **changes})
    flops = forward_flops(config)
    products = flops.layers + flops.head - depthwise(config)
    assert counted(config, backward=False) == TOKENS * products
    # The loss adds the head's gradient up in place, an operator that the counter does not know.
    assert counted(config, backward=True) == TOKENS * (3 * products - flops.head)
    wrong = ModelConfig.model_validate({**BASE, **changes, "mlp_expansion": 3.0})
    assert counted(config, backward=False) != TOKENS * (forward_flops(wrong).layers + flops.head - depthwise(wrong))


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("documents", [None, [17], [1, 1, 5, 10], [16, 1]])
def test_score_pairs(window, documents):
    starts = torch.tensor([sum((documents or [17])[:i]) for i, n in enumerate(documents or [17]) for _ in range(n)])
    position = torch.arange(17)
    distance = position.unsqueeze(1) - position
    mask = (distance >= 0) & (starts.unsqueeze(1) == starts)
    if window is not None:
        mask &= distance < window
    assert score_pairs(17, window, documents) == int(mask.sum())
    with pytest.raises(ValueError, match="do not fill"):
        score_pairs(18, window, documents or [17])


def test_attention_per_pair_is_two_products_of_a_head():
    config = ModelConfig.model_validate(BASE)
    q, k, v = (torch.randn(4, 6, 8) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        (q @ k.mT).softmax(-1) @ v
    assert forward_flops(config).attention == config.num_layers * counter.get_total_flops() // 36


def test_training_flops():
    config = ModelConfig.model_validate(BASE)
    forward = forward_flops(config)
    attention = forward.attention * (100 * 101 // 2) / 100
    assert training_flops_per_token(config, 100) == 3 * (forward.layers + forward.head + attention)
    plain = training_flops_per_token(config, 100, activation_checkpointing="none")
    again = training_flops_per_token(config, 100, activation_checkpointing="layer")
    assert again - plain == forward.layers
    assert plain - training_flops_per_token(config, 100) == pytest.approx(0.5 * attention)
    assert training_flops_per_token(config, 100, [50, 50]) < training_flops_per_token(config, 100)
    with pytest.raises(ValueError, match="layers"):
        training_flops_per_token(config, 100, activation_checkpointing="layers")


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA TITAN X", None),
        ("", None),
    ],
)
def test_peaks_by_name(name, peak):
    assert peak_flops(name) == peak
    assert mfu(1e14, name) == (None if peak is None else pytest.approx(1e14 / peak))
