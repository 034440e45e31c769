"""ZAYA, the released model with CCGQA layers: its names and settings in transformers, and ours.

What both have is the attention layer and what stands around it: embedding, norms, head. ZAYA's experts, their router
and its learned scales of the residual stream have no counterpart here, and our dense MLP has none there.

Sources: transformers 5.23 (models/zaya); arXiv 2605.05365 for the model.
"""

from typing import Any

from torch import Tensor

from hydra_dist.config import ModelConfig
from hydra_dist.errors import ConfigError
from hydra_dist.model.interop.rules import Named, Rule, grouped_taps, reshaped, same, stacked
from hydra_dist.model.interop.settings import Settings
from hydra_dist.model.interop.zaya_first_release import is_first_release, todays_settings
from hydra_dist.model.prologue import HIGHEST_CLAMPED, LOWEST_CLAMPED

ARCHITECTURE = "ZayaForCausalLM"
OURS_ALONE = "the dense MLPs of our layers"
FULL, SLIDING = "hybrid", "hybrid_sliding"
DEFAULT_THETA = {FULL: 5_000_000.0, SLIDING: 10_000.0}
"""What transformers takes where ``config.json`` has no ``rope_parameters``."""


def attention_rules(layer: ModelConfig, ours: str, theirs: str) -> list[Rule]:
    """One attention layer: CCGQA's parameters behind the prefix ``ours``, ZayaAttention's behind ``theirs``."""
    num_heads, head_dim = layer.num_query_heads + layer.num_key_heads, layer.head_dim
    channels, half = num_heads * head_dim, layer.key_size // 2
    taps, grouped = layer.conv_kernel_sizes
    qkv, prologue = f"{theirs}qkv_proj.", f"{ours}prologue."
    projections = [
        (f"{qkv}q_proj.weight", layer.query_size),
        (f"{qkv}k_proj.weight", layer.key_size),
        (f"{qkv}v_proj_current.weight", half),
        (f"{qkv}v_proj_delayed.weight", half),
    ]
    depthwise, across = f"{qkv}conv_qk_depthwise", f"{qkv}conv_qk_grouped"
    return [
        stacked(f"{ours}down.weight", projections, layer.hidden_size),
        reshaped(f"{prologue}depthwise_weight", (channels, taps), f"{depthwise}.weight", (channels, 1, taps)),
        same(f"{prologue}depthwise_bias", f"{depthwise}.bias", channels),
        grouped_taps(f"{prologue}grouped_weight", f"{across}.weight", num_heads, head_dim, grouped),
        reshaped(f"{prologue}grouped_bias", (num_heads, head_dim), f"{across}.bias", (channels,)),
        _temperature(f"{prologue}tau", f"{theirs}qk_norm.temp", layer),
        same(f"{ours}output.weight", f"{theirs}o_proj.weight", layer.hidden_size, layer.query_size),
    ]


def rules(config: ModelConfig) -> list[Rule]:
    """Everything that both models have."""
    assert config.vocab_size is not None
    width = config.hidden_size
    found = [same("embedding.weight", "model.embed_tokens.weight", config.vocab_size, width)]
    for index, layer in enumerate(config.layers):
        ours, theirs = f"layers.{index}.", f"model.layers.{index}."
        found.append(same(f"{ours}attention_norm.weight", f"{theirs}input_layernorm.weight", width))
        found += attention_rules(layer, f"{ours}attention.", f"{theirs}self_attn.")
        found.append(same(f"{ours}mlp_norm.weight", f"{theirs}post_attention_layernorm.weight", width))
    found.append(same("norm.weight", "model.norm.weight", width))
    if not config.tie_embeddings:
        found.append(same("head.weight", "lm_head.weight", config.vocab_size, width))
    return found


def written_config(config: ModelConfig) -> dict[str, Any]:
    """What ``config.json`` says of the parts that both have. ConfigError for a model that ZAYA's layer cannot be."""
    first, *others = config.layers
    for key in ("num_query_heads", "num_key_heads", "conv_kernel_sizes"):
        for number, layer in enumerate(others, start=1):
            if getattr(layer, key) != getattr(first, key):
                raise ConfigError(
                    f"model.{key} is {_plain(getattr(first, key))} in layer 0 and {_plain(getattr(layer, key))} in "
                    f"layer {number}, and zaya has one for all layers; a model without layer_settings for it works"
                )
    for key in ("use_convs", "use_qk_mean", "use_qk_norm", "use_value_shift"):
        if not all(getattr(layer, key) for layer in config.layers):
            raise ConfigError(f"model.{key} is false, and zaya's layer always has it; a model with it works")
    windows = sorted({layer.window for layer in config.layers if layer.window is not None})
    if len(windows) > 1:
        raise ConfigError(
            f"model.layer_windows has windows of {' and '.join(map(str, windows))} tokens, and zaya has one for all "
            "sliding layers; one window, beside layers without, works"
        )
    fraction = config.rope_fraction
    if int(config.head_dim * fraction) != config.rope_dim:
        fraction = (config.rope_dim + 0.5) / config.head_dim  # halfway, so that no rounding makes it another integer
    rope = {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": fraction}
    return {
        "num_attention_heads": first.num_query_heads,
        "num_key_value_heads": first.num_key_heads,
        "head_dim": config.head_dim,
        "cca_time0": first.conv_kernel_sizes[0],
        "cca_time1": first.conv_kernel_sizes[1],
        "layer_types": [FULL if layer.window is None else SLIDING for layer in config.layers],
        "sliding_window": windows[0] if windows else None,
        "rope_parameters": {FULL: rope, SLIDING: dict(rope)},
        "lm_head_bias": False,
        "pad_token_id": None,
    }


def model_settings(config: Settings) -> dict[str, Any]:
    """Settings of a ``ModelConfig`` from ZAYA's ``config.json``, of today or with the first release's keys."""
    if is_first_release(config):
        config = todays_settings(config)
    config.expect("attention_bias", False, "biases of the projections have no counterpart")
    config.expect("lm_head_bias", False, "a bias of the head has no counterpart")
    layers, head_dim = config.count("num_hidden_layers"), config.count("head_dim", 128)
    types = config.get("layer_types", [FULL] * layers)
    if not isinstance(types, list) or len(types) != layers or not set(types) <= {FULL, SLIDING}:
        raise config.refused("layer_types", f'"{FULL}" or "{SLIDING}" for each of {layers} layers works')
    window = config.count("sliding_window") if SLIDING in types else None
    theta, fraction = _rope(config, sorted(set(types)))
    if int(head_dim * fraction) % 2:
        raise config.refused("rope_parameters", f"{fraction} x head_dim {head_dim} is no even number of dimensions")
    return {
        "attention": "ccgqa",
        "num_layers": layers,
        "head_dim": head_dim,
        "num_query_heads": config.count("num_attention_heads"),
        "num_key_heads": config.count("num_key_value_heads"),
        "conv_kernel_sizes": [config.count("cca_time0", 2), config.count("cca_time1", 2)],
        "temperature": "exp_clamp" if config.flag("clamp_temp", False) else "raw",
        "layer_windows": [window if kind == SLIDING else None for kind in types] if window else None,
        "rope_theta": theta,
        "rope_fraction": fraction,
        "tie_embeddings": config.flag("tie_word_embeddings", True),
        "norm_eps": config.number("rms_norm_eps", 1e-5),
    }


def _rope(config: Settings, types: list[str]) -> tuple[float, float]:
    """Theta and the rotated share of a head, which have to be the same for all types of layers in use."""
    parameters = config.section("rope_parameters")
    nested = any(kind in parameters.values for kind in (FULL, SLIDING))
    found = set()
    for kind in types:
        one = parameters.section(kind) if nested else parameters
        one.expect("rope_type", "default", "other angles than position x theta^(-2i/d) are not built")
        found.add((one.number("rope_theta", DEFAULT_THETA[kind]), one.number("partial_rotary_factor", 0.5)))
    if len(found) > 1:
        raise config.refused(
            "rope_parameters", "full and sliding layers rotate differently; one rotation for all works"
        )
    return found.pop()


def _temperature(ours: str, theirs: str, layer: ModelConfig) -> Rule:
    """Here tau and what it means, there the factor itself.

    ``raw`` is the same number. Another meaning is written as the factor that it comes to, rounded once; it has no way
    back to the same tau, so that it can be read as ``raw`` only.
    """
    shape = (layer.num_key_heads,)

    def split(tau: Tensor) -> list[Tensor]:
        if layer.temperature == "raw":
            return [tau]
        clamped = tau.clamp(LOWEST_CLAMPED, HIGHEST_CLAMPED) if layer.temperature == "exp_clamp" else tau
        return [clamped.exp()]

    return Rule(Named(ours, shape), (Named(theirs, shape),), lambda parts: parts[0], split)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
