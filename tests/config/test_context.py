"""How a sequence is spread over ranks: what goes together, and what a refusal suggests."""

import re

import pytest

from hydra_dist.config.file import build_config
from hydra_dist.errors import ConfigError


def build(model=(), length=4096, **context):
    heads = {"num_layers": 2, "hidden_size": 512, "head_dim": 64, "num_query_heads": 8, "num_key_heads": 2}
    return build_config(
        {
            "model": {**heads, **dict(model)},
            "data": {"directory": "data/x", "sequence_length": length},
            "run": {"directory": "runs/x"},
            "context": context,
        },
        "run.yaml",
    )


@pytest.mark.parametrize(
    "context",
    [
        {"size": 3, "strategy": "ring"},
        {"size": 8, "strategy": "ring", "inner_ring": 4},
        {"size": 8, "strategy": "all_gather", "layout": "balanced"},
        {"size": 8, "strategy": "ulysses"},
        {"size": 8, "strategy": "hybrid"},
        {"size": 16, "strategy": "hybrid", "ulysses_size": 4, "inner_ring": 2},
        {"size": 8, "strategy": "auto"},
        {"size": 1, "strategy": "ulysses"},
    ],
    ids=str,
)
def test_what_goes_together(context):
    found = build(**context).context
    assert {key: getattr(found, key) for key in context} == context


@pytest.mark.parametrize(
    ("context", "words"),
    [
        ({"size": 64, "length": 100}, "data.sequence_length 100 is shorter than the 128 pieces"),
        ({"size": 16, "strategy": "ulysses"}, "context.size 16: layers of 8 and 2 query and key heads"),
        ({"size": 6, "strategy": "hybrid", "ulysses_size": 3}, "context.ulysses_size 3: layers of 8 and 2"),
        ({"size": 8, "strategy": "hybrid", "ulysses_size": 3}, "context.ulysses_size 3 does not divide context.size 8"),
        ({"size": 8, "strategy": "ring", "ulysses_size": 2}, "context.ulysses_size 2 is for context.strategy hybrid"),
        ({"size": 8, "inner_ring": 3}, "context.inner_ring 3 does not divide the 8 ranks of the ring"),
        ({"size": 8, "strategy": "ulysses", "inner_ring": 2}, "context.inner_ring 2 is for the strategies ring and"),
        ({"size": 8, "strategy": "hybrid", "inner_ring": 2}, "needs context.ulysses_size"),
        ({"size": 8, "strategy": "rings"}, "context.strategy: 'rings': input should be 'auto', 'ring', "),
        ({"size": 2, "layout": "striped"}, "read the row before each row, which another rank then holds"),
        ({"size": 2, "inter_node_bandwidth": 0}, "context.inter_node_bandwidth: 0"),
    ],
    ids=str,
)
def test_what_does_not_is_refused_with_what_works(context, words):
    length = context.pop("length", 4096)
    with pytest.raises(ConfigError) as caught:
        build(length=length, **context)
    message = str(caught.value)
    assert words in message
    for key, value in re.findall(r"context\.(\w+)=(\w+)", message.split("; ", 1)[-1]):
        changed = {**context, key: int(value) if value.isdigit() else value}
        if "with context.ulysses_size" in message and key == "strategy" and value == "hybrid":
            continue  # only together with the next one
        if key == "ulysses_size":
            changed["strategy"] = "hybrid"
        build(length=length, **changed)


def test_striped_is_for_layers_that_read_no_row_before():
    build({"attention": "gqa"}, size=4, layout="striped")
    build({"use_convs": False, "use_value_shift": False}, size=4, layout="striped")
    with pytest.raises(ConfigError, match="convolutions or its value shift"):
        build({"use_convs": False}, size=4, layout="striped")


def test_one_layer_whose_heads_cannot_be_shared_is_enough_to_refuse():
    layers = {"layer_settings": [{"layers": [1], "num_query_heads": 2, "num_key_heads": 1}]}
    with pytest.raises(ConfigError, match="layers of 2 and 1, 8 and 2 query and key heads"):
        build(layers, size=4, strategy="ulysses")
    build(layers, size=2, strategy="ulysses")
