"""Floating-point operations of a model: a multiplication and an addition count as two.

Only matrix products, convolutions and attention scores are counted; norms, rotations and activations are memory-bound
and about 1 % of the operations. Attention counts the pairs of tokens that its mask leaves, not the square.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from hydra_dist.config import ModelConfig

PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989.4e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "H20": 148e12,
    "H200": 989.4e12,
    "H200 NVL": 835.5e12,
    "L40S": 362e12,
    "B200": 2250e12,
}
"""Dense bf16 operations a second, from NVIDIA's data sheets, by a part of the name that CUDA gives the device."""


@dataclass(frozen=True)
class ForwardFlops:
    """Of one token through all layers, except ``attention``, which is of one pair (query token, key token)."""

    projections: int
    convolutions: int
    mlp: int
    head: int
    attention: int
    """Per pair over all layers and heads: 4 e_q a layer, half for q k, half for the sum of values."""

    @property
    def layers(self) -> int:
        """Of one token, without head and attention scores."""
        return self.projections + self.convolutions + self.mlp


def forward_flops(model: ModelConfig) -> ForwardFlops:
    """By kind; raises ValueError where ``vocab_size`` is not set."""
    if model.vocab_size is None:
        raise ValueError("vocab_size is not set")
    width, layers = model.hidden_size, model.layers
    return ForwardFlops(
        projections=sum(2 * width * (2 * layer.query_size + 2 * layer.key_size) for layer in layers),
        convolutions=sum(_convolution_flops(layer) for layer in layers),
        mlp=len(layers) * 6 * width * model.mlp_size,
        head=2 * width * model.vocab_size,
        attention=sum(_flops_per_pair(layer) for layer in layers),
    )


def _convolution_flops(layer: ModelConfig) -> int:
    """Of one token in one layer: taps of the channel itself, and of all channels of its head."""
    if layer.attention != "ccgqa" or not layer.use_convs:
        return 0
    depthwise_taps, grouped_taps = layer.conv_kernel_sizes
    return 2 * (layer.query_size + layer.key_size) * (depthwise_taps + layer.head_dim * grouped_taps)


def _flops_per_pair(layer: ModelConfig) -> int:
    return 4 * layer.query_size


def score_pairs(sequence_length: int, window: int | None = None, document_lengths: Iterable[int] | None = None) -> int:
    """Pairs (query, key) that causal attention computes in one sequence: S (S + 1) / 2 where nothing else limits it.

    Args:
        sequence_length: tokens.
        window: keys that a query sees, itself included; None: all before it.
        document_lengths: tokens of each document packed into the sequence; None: one document.
    """
    lengths = [sequence_length] if document_lengths is None else list(document_lengths)
    if sum(lengths) != sequence_length:
        raise ValueError(f"documents of {sum(lengths)} tokens in all do not fill a sequence of {sequence_length}")
    total = 0
    for length in lengths:
        seen = length if window is None else min(window, length)
        total += seen * (seen + 1) // 2 + (length - seen) * seen
    return total


def training_flops_per_token(
    model: ModelConfig,
    sequence_length: int,
    document_lengths: Iterable[int] | None = None,
    activation_checkpointing: str | None = None,
) -> float:
    """Forward and backward, a token, averaged over the sequence.

    Without ``activation_checkpointing``: the model's FLOPs, 3 x forward, as MFU counts them whatever an implementation
    computes again (Chowdhery et al. 2022, arXiv 2204.02311, appendix B). With it (``none`` or ``layer``): what this
    implementation runs: attention's backward recomputes the scores (2.5 x its forward instead of 2 x), and ``layer``
    runs everything in a layer but attention once more.
    """
    forward = forward_flops(model)
    lengths = None if document_lengths is None else list(document_lengths)
    layers = model.layers
    pairs = {window: score_pairs(sequence_length, window, lengths) for window in {layer.window for layer in layers}}
    attention = sum(_flops_per_pair(layer) * pairs[layer.window] for layer in layers) / sequence_length
    if activation_checkpointing is None:
        return 3 * (forward.layers + forward.head + attention)
    if activation_checkpointing not in ("none", "layer"):
        raise ValueError(f"activation_checkpointing {activation_checkpointing}")
    runs = 4 if activation_checkpointing == "layer" else 3
    return runs * forward.layers + 3 * forward.head + 3.5 * attention


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations a second of a GPU by its CUDA name, or None for one that the table does not have."""
    words = device_name.lower()
    known = [name for name in PEAK_FLOPS if all(part in _parts(words) for part in _parts(name.lower()))]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def mfu(flops_per_second: float, device_name: str) -> float | None:
    """Model FLOPs utilisation of one GPU: model FLOPs a second over its dense bf16 peak; None for an unknown one."""
    peak = peak_flops(device_name)
    return None if peak is None else flops_per_second / peak


def _parts(name: str) -> list[str]:
    return name.replace("-", " ").split()
