"""Llama, the plain transformer with grouped-query attention: its names and settings in transformers, and ours.

A model whose layers are all ``attention: gqa`` with whole heads rotated and no window is a Llama, tensor by tensor.

Source: transformers 5.23 (models/llama).
"""

from typing import Any

from hydra_dist.config import ModelConfig
from hydra_dist.errors import ConfigError
from hydra_dist.model.interop.rules import Rule, same, stacked
from hydra_dist.model.interop.settings import Settings

ARCHITECTURE = "LlamaForCausalLM"
OURS_ALONE = ""


def rules(config: ModelConfig) -> list[Rule]:
    """The whole model."""
    assert config.vocab_size is not None
    width, mlp_size = config.hidden_size, config.mlp_size
    found = [same("embedding.weight", "model.embed_tokens.weight", config.vocab_size, width)]
    for index, layer in enumerate(config.layers):
        ours, theirs = f"layers.{index}.", f"model.layers.{index}."
        attention, mlp = f"{theirs}self_attn.", f"{theirs}mlp."
        qkv = [
            (f"{attention}q_proj.weight", layer.query_size),
            (f"{attention}k_proj.weight", layer.key_size),
            (f"{attention}v_proj.weight", layer.key_size),
        ]
        gate_up = [(f"{mlp}gate_proj.weight", mlp_size), (f"{mlp}up_proj.weight", mlp_size)]
        found += [
            same(f"{ours}attention_norm.weight", f"{theirs}input_layernorm.weight", width),
            stacked(f"{ours}attention.qkv.weight", qkv, width),
            same(f"{ours}attention.output.weight", f"{attention}o_proj.weight", width, layer.query_size),
            same(f"{ours}mlp_norm.weight", f"{theirs}post_attention_layernorm.weight", width),
            stacked(f"{ours}mlp.gate_up.weight", gate_up, width),
            same(f"{ours}mlp.down.weight", f"{mlp}down_proj.weight", width, mlp_size),
        ]
    found.append(same("norm.weight", "model.norm.weight", width))
    if not config.tie_embeddings:
        found.append(same("head.weight", "lm_head.weight", config.vocab_size, width))
    return found


def written_config(config: ModelConfig) -> dict[str, Any]:
    """``config.json`` but for what every model has. ConfigError for a model that is no Llama."""
    for layer in config.layers:
        for key, heads in (("num_query_heads", layer.num_query_heads), ("num_key_heads", layer.num_key_heads)):
            if heads != getattr(config.layers[0], key):
                raise ConfigError(
                    f"model.{key} is {getattr(config.layers[0], key)} in layer 0 and {heads} in another, and llama has "
                    "one for all layers; a model without layer_settings for it works"
                )
        if layer.window is not None:
            raise ConfigError(f"model.window {layer.window}: llama has no windows; a model without works")
    if config.rope_dim != config.head_dim:
        raise ConfigError(
            f"model.rope_fraction {config.rope_fraction}: llama rotates whole heads; a model with 1.0 works"
        )
    num_query_heads, num_key_heads = config.layers[0].num_query_heads, config.layers[0].num_key_heads
    if config.hidden_size % num_query_heads:
        raise ConfigError(
            f"model.hidden_size {config.hidden_size} is no multiple of {num_query_heads} query heads, and transformers "
            "refuses such a llama; a model with heads that divide it works"
        )
    return {
        "num_attention_heads": num_query_heads,
        "num_key_value_heads": num_key_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_size,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,  # for readers from before rope_parameters
        "mlp_bias": False,
        "pretraining_tp": 1,
    }


def model_settings(config: Settings) -> dict[str, Any]:
    """Settings of a ``ModelConfig`` from Llama's ``config.json``, with ``rope_parameters`` or with the older keys."""
    config.expect("attention_bias", False, "biases of the projections have no counterpart")
    config.expect("mlp_bias", False, "biases of the projections have no counterpart")
    config.expect("hidden_act", "silu", "the MLP here is SwiGLU")
    hidden_size, heads = config.count("hidden_size"), config.count("num_attention_heads")
    intermediate_size = config.count("intermediate_size")
    if intermediate_size % 16:
        raise config.refused("intermediate_size", "a multiple of 16 is needed")
    rope = config.section("rope_parameters")
    for parameters in (rope, config.section("rope_scaling")):
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind != "default":
            raise ConfigError(
                f"{config.source}: rope type {kind!r}: other angles than position x theta^(-2i/d) are not built; "
                "a model without rope_scaling works"
            )
        parameters.expect("partial_rotary_factor", 1.0, "llama rotates whole heads")
    return {
        "attention": "gqa",
        "num_layers": config.count("num_hidden_layers"),
        "head_dim": config.count("head_dim", hidden_size // heads),
        "num_query_heads": heads,
        "num_key_heads": config.count("num_key_value_heads", heads),
        "rope_theta": rope.number("rope_theta", config.number("rope_theta", 10_000.0)),
        "rope_fraction": 1.0,
        "mlp_expansion": intermediate_size / hidden_size,
        "tie_embeddings": config.flag("tie_word_embeddings", False),
        "norm_eps": config.number("rms_norm_eps", 1e-6),
    }
