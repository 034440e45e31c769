"""Counted parameters are those of the model."""

import pytest

from hydra_dist.config import ModelConfig
from hydra_dist.costs.parameters import count_parameters
from hydra_dist.model import Transformer

BASE = {"vocab_size": 51, "num_layers": 3, "hidden_size": 40, "head_dim": 8, "num_query_heads": 4, "num_key_heads": 2}
MIXED = {
    "use_output_norm": True,
    "layer_settings": [
        {"layers": [0], "compression_factor": 1, "conv_kernel_sizes": [4, 3]},
        {"layers": [2], "attention": "gqa", "num_key_heads": 1},
    ],
}
PARTS = {
    "embedding": ["embedding."],
    "projections": [".attention.down.", ".attention.output.", ".attention.qkv."],
    "convolutions": [".depthwise_", ".grouped_"],
    "temperatures": [".tau"],
    "output_norms": [".output_norm."],
    "mlp": [".mlp."],
    "layer_norms": ["attention_norm.", "mlp_norm."],
    "head": ["head."],
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "gqa"},
        {"tie_embeddings": False},
        {"use_convs": False},
        {"use_qk_norm": False},
        {"conv_kernel_sizes": (3, 4), "num_key_heads": 1},
        {"mlp_expansion": 1.1, "use_value_shift": False, "use_qk_mean": False},
        {"use_output_norm": True, "temperature": "raw"},
        {"num_query_heads": None, "num_key_heads": None, "query_compression": 1, "key_compression": 5},
        MIXED,
        {**MIXED, "attention": "gqa"},
    ],
    ids=str,
)
def test_parts_and_total(changes):
    config = ModelConfig.model_validate({**BASE, **changes})
    count, model = count_parameters(config), Transformer(config)
    names = {name: p.numel() for name, p in model.named_parameters()}
    assert count.total == sum(names.values())
    for part, fragments in PARTS.items():
        real = sum(n for name, n in names.items() if any(fragment in name for fragment in fragments))
        assert getattr(count, part) == real, part
    assert count.final_norm == 40
    assert count.layers == sum(n for name, n in names.items() if name.startswith("layers."))


def test_the_comparison_rejects_layers_of_other_shapes():
    config = ModelConfig.model_validate({**BASE, **MIXED})
    real = sum(p.numel() for p in Transformer(config).parameters())
    assert count_parameters(config).total == real
    for index in range(2):
        fewer = ModelConfig.model_validate({**BASE, **MIXED, "layer_settings": [MIXED["layer_settings"][index]]})
        assert count_parameters(fewer).total != real


def test_the_published_shape():
    """The attention layer of ZAYA1: 5.243 M in projections, 0.333 M in convolutions and temperatures."""
    config = ModelConfig(vocab_size=8, num_layers=1, hidden_size=2048, head_dim=128, num_query_heads=8, num_key_heads=2)
    count = count_parameters(config)
    assert count.projections == 5_242_880
    assert count.convolutions + count.temperatures == 1280 * (2 + 256 + 2) + 2 == 332_802


def test_without_a_vocabulary():
    with pytest.raises(ValueError, match="vocab_size"):
        count_parameters(ModelConfig.model_validate({**BASE, "vocab_size": None}))
