"""Counted operations against torch's counter on the real model, where that counts, and against plain counting."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hydra_dist.config import ModelConfig
from hydra_dist.costs.flops import forward_flops, mfu, peak_flops, score_pairs, training_flops_per_token
from hydra_dist.model import Transformer, initialize

BASE = {"vocab_size": 51, "num_layers": 2, "hidden_size": 40, "head_dim": 8, "num_query_heads": 4, "num_key_heads": 2}
TOKENS = 24


MIXED = {
    "num_layers": 3,
    "layer_settings": [
        {"layers": [0], "compression_factor": 1, "conv_kernel_sizes": [4, 3], "window": 5},
        {"layers": [2], "attention": "gqa", "num_key_heads": 1},
    ],
}


def counted(config, backward):
    """Of linear layers and head: all but attention and what CCGQA does before it, each one operator of ours."""
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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "gqa"},
        {"use_convs": False},
        {"conv_kernel_sizes": (3, 4)},
        {"tie_embeddings": False},
        {"use_output_norm": True},
        MIXED,
    ],
    ids=str,
)
def test_forward_and_training_match_the_counter(changes):
    config = ModelConfig.model_validate({**BASE, **changes})
    flops = forward_flops(config)
    products = flops.projections + flops.mlp + flops.head
    assert counted(config, backward=False) == TOKENS * products
    # The loss adds the head's gradient up in place, an operator that the counter does not know.
    assert counted(config, backward=True) == TOKENS * (3 * products - flops.head)
    for wrong in ({"mlp_expansion": 3.0}, {"num_query_heads": 2}):
        other = forward_flops(ModelConfig.model_validate({**BASE, **changes, **wrong}))
        assert other.projections + other.mlp + other.head != products


@pytest.mark.parametrize("changes", [{}, {"conv_kernel_sizes": (3, 4)}, {"conv_kernel_sizes": (1, 1)}, MIXED], ids=str)
def test_convolutions_match_the_counter(changes):
    """torch's own convolutions with the same channels, groups and taps, over the rows that have all of them."""
    config, total = ModelConfig.model_validate({**BASE, **changes}), 0
    for layer in config.layers:
        if layer.attention == "gqa":
            continue
        heads, channels = layer.num_query_heads + layer.num_key_heads, layer.query_size + layer.key_size
        for taps, groups in zip(layer.conv_kernel_sizes, (channels, heads), strict=True):
            convolution = torch.nn.Conv1d(channels, channels, taps, groups=groups, bias=False)
            assert forward_flops(layer).convolutions % channels == 0
            with FlopCounterMode(display=False) as counter:
                convolution(torch.randn(1, channels, TOKENS + taps - 1))
            total += counter.get_total_flops()
    assert TOKENS * forward_flops(config).convolutions == total
    assert forward_flops(ModelConfig.model_validate({**BASE, **changes, "use_convs": False})).convolutions == 0


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


def test_each_layer_counts_the_pairs_of_its_own_window():
    config = ModelConfig.model_validate({**BASE, **MIXED})
    forward, per_pair = forward_flops(config), [4 * layer.query_size for layer in config.layers]
    assert forward.attention == sum(per_pair)
    assert len(set(per_pair)) == 2
    full, narrow = score_pairs(100), score_pairs(100, 5)
    attention = (per_pair[0] * narrow + (per_pair[1] + per_pair[2]) * full) / 100
    assert training_flops_per_token(config, 100) == 3 * (forward.layers + forward.head + attention)
    every = [layer.window for layer in config.layers]
    average = forward.attention * sum(score_pairs(100, window) for window in every) / len(every) / 100
    assert attention != average, "layers with more heads and other windows do not average out"


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
