"""Extents of dense models: what follows from them, and what fits no model."""

import pytest

from hydra_dist.errors import ConfigError


def test_widths_of_grouped_queries(gpt):
    model = gpt(num_key_heads=2, head_dim=96, gated_mlp=True)
    assert (model.query_size, model.key_size, model.mlp_inputs) == (768, 192, 4096)


def test_bias_of_the_projection_to_queries_and_keys_follows_the_others_unless_said(gpt):
    assert gpt().has_qkv_bias
    assert not gpt(linear_bias=False).has_qkv_bias
    assert gpt(linear_bias=False, qkv_bias=True).has_qkv_bias


@pytest.mark.parametrize("change", [{"num_layers": 0}, {"vocab_size": -1}, {"head_dim": 0}, {"max_positions": 0}])
def test_extents_are_positive(gpt, change):
    with pytest.raises(ConfigError, match=f"model.{next(iter(change))}"):
        gpt(**change)


def test_key_heads_divide_query_heads_and_the_suggestion_works(gpt):
    with pytest.raises(ConfigError, match=r"num_query_heads 8 .*num_key_heads 3; 8 key heads work"):
        gpt(num_key_heads=3)
    gpt(num_key_heads=8)
