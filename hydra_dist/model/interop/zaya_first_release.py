"""ZAYA's first release: other names of tensors and settings, and attention and experts as layers of their own, in turn.

Layers 2i (attention) and 2i + 1 (experts) of a first release are layer i of today. Its ``config.json`` is known by the
key ``cca_num_q_heads``, its tensors by their names.

Source: public listings of the tensors and settings of ZAYA1-8B's first release, which agree with each other; the
weights themselves were not at hand.
"""

import re
from collections.abc import Iterable

from hydra_dist.model.interop.settings import Settings

ATTENTION = {
    "self_attn.qkv.linear_q.": "self_attn.qkv_proj.q_proj.",
    "self_attn.qkv.linear_k.": "self_attn.qkv_proj.k_proj.",
    "self_attn.qkv.val_proj1.": "self_attn.qkv_proj.v_proj_current.",
    "self_attn.qkv.val_proj2.": "self_attn.qkv_proj.v_proj_delayed.",
    "self_attn.qkv.conv_qk.0.": "self_attn.qkv_proj.conv_qk_depthwise.",
    "self_attn.qkv.conv_qk.1.": "self_attn.qkv_proj.conv_qk_grouped.",
    "self_attn.qkv.temp": "self_attn.qk_norm.temp",
}
MARK = "self_attn.qkv.linear_q.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def todays_names(names: Iterable[str]) -> dict[str, str]:
    """Each name of a checkpoint and what transformers 5.23 calls it; names that are not known stay as they are.

    In the first release attention and experts are layers of their own, in turn: a layer of today is an attention layer
    and the expert layer after it, whose ``input_norm`` is today's ``post_attention_layernorm``.
    """
    names = list(names)
    attention = sorted(int(match[1]) for name in names if (match := _LAYER.fullmatch(name)) and match[2] == MARK)
    if not attention:
        return {name: name for name in names}
    block = {layer: index for index, layer in enumerate(attention)}
    after = {layer + 1: index for layer, index in block.items() if layer + 1 not in block}
    found = {}
    for name in names:
        match = _LAYER.fullmatch(name)
        layer, rest = (int(match[1]), match[2]) if match else (-1, "")
        if name == "model.final_norm.weight":
            found[name] = "model.norm.weight"
        elif layer in after and rest == "input_norm.weight":
            found[name] = f"model.layers.{after[layer]}.post_attention_layernorm.weight"
        elif layer in block and (today := _todays_attention(rest)):
            found[name] = f"model.layers.{block[layer]}.{today}"
        else:
            found[name] = name
    return found


def _todays_attention(name: str) -> str | None:
    if name == "input_norm.weight":
        return "input_layernorm.weight"
    if name == "self_attn.o_proj.weight":
        return name
    for first, today in ATTENTION.items():
        if name.startswith(first):
            return today + name.removeprefix(first)
    return None


def is_first_release(config: Settings) -> bool:
    """Does ``config.json`` have the first release's keys?"""
    return "cca_num_q_heads" in config.values


def todays_settings(config: Settings) -> Settings:
    """The first release's ``config.json`` with today's keys."""
    windows = config.get("swa_layers")
    if windows and any(windows if isinstance(windows, list) else [windows]):
        raise config.refused("swa_layers", "sliding layers are read in today's form only (layer_types, sliding_window)")
    layers = config.count("num_hidden_layers")
    if layers % 2:
        raise config.refused("num_hidden_layers", "an attention and an expert layer in turn make an even number")
    theta = config.get("rope_theta", config.get("rotary_base", 5_000_000.0))
    fraction = config.get("partial_rotary_factor", config.get("rope_pct", 0.5))
    changes = {
        "num_hidden_layers": layers // 2,
        "num_attention_heads": config.count("cca_num_q_heads"),
        "num_key_value_heads": config.get("num_query_groups", config.get("num_key_value_heads")),
        "head_dim": config.get("kv_channels") or config.count("hidden_size") // config.count("num_attention_heads"),
        "rms_norm_eps": config.get("norm_epsilon", config.get("rms_norm_eps")),
        "layer_types": None,
        "rope_parameters": {"rope_theta": theta, "partial_rotary_factor": fraction},
    }
    return Settings(config.source, {**config.values, **changes})
