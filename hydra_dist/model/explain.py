"""Which implementations the layers of a model run on, and why."""

import torch

from hydra_dist.attention import Mask, explain
from hydra_dist.config import ModelConfig
from hydra_dist.model.ccgqa import CCGQA
from hydra_dist.model.prologue_operator import choose
from hydra_dist.model.transformer import attention_layer


def explain_layers(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, sequence_length: int, over_ranks: bool
) -> list[str]:
    """One line for each thing that is chosen, with the layers that it is for.

    Args:
        dtype: in which the layers compute.
        sequence_length: of the packed rows.
        over_ranks: keys come from other ranks, so attention is computed in tiles.
    """
    found: dict[str, list[int]] = {}
    for index, layer in enumerate(config.layers):
        with torch.device("meta"):
            attention = attention_layer(layer)
        if isinstance(attention, CCGQA):
            name, why = choose("auto", device, dtype, attention.prologue.switches)
            found.setdefault(f"CCGQA prologue {name}: {why}", []).append(index)
        q, k = (
            torch.empty(1, 1, heads, layer.head_dim, device=device, dtype=dtype).expand(1, sequence_length, -1, -1)
            for heads in (layer.num_query_heads, layer.num_key_heads)
        )
        starts = torch.zeros(1, sequence_length, dtype=torch.int64, device=device)
        line = explain(q, k, Mask(window=layer.window, document_starts=starts), in_tiles=over_ranks)
        found.setdefault(line, []).append(index)
    return [f"layers {_ranges(layers)}: {line}" for line, layers in found.items()]


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 -> 0-2, 5"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
