"""Bytes that a training step keeps for backward, from what each part of this implementation saves.

All numbers are per local token. What is saved: the inputs of matrix products, attention's q, k, v, out and lse, norms'
inputs and one number a row. The residual stream is in the parameters' dtype (fp32 under autocast), matrix products and
what they read in the compute dtype, norms and softmax in fp32.
"""

from dataclasses import dataclass
from typing import Literal

from hydra_dist.config import ModelConfig
from hydra_dist.costs.parameters import count_parameters

Precision = Literal["fp32", "bf16", "bf16_autocast"]
ELEMENT_BYTES = {"fp32": (4, 4), "bf16": (2, 2), "bf16_autocast": (4, 2)}
"""Of the residual stream, and of what matrix products read."""
WIDE = 4
"""fp32: row statistics, lse, queries and keys before their norm, rotation tables."""
INDEX = 8
"""A token id."""


@dataclass(frozen=True)
class ActivationBytes:
    """Kept between forward and backward, bytes per local token."""

    norms: int
    """One layer: the residual stream before both norms, and what comes out of them."""
    queries_and_keys: int
    """One layer: what leads to attention's queries and keys (latent, convolutions, q-k-norm)."""
    attention: int
    """One layer: q, k, v, out and lse."""
    mlp: int
    """One layer: gate, up and their product."""
    ends: int
    """Once a model: token ids, rotation tables, final norm, and the loss's gradient, which forward computes."""
    checkpoint: int
    """One layer under ``activation_checkpointing: layer``: its input and its attention result."""
    num_layers: int

    @property
    def layer(self) -> int:
        """One layer, without checkpointing."""
        return self.norms + self.queries_and_keys + self.attention + self.mlp

    def total(self, activation_checkpointing: str) -> int:
        """After forward, over all layers.

        While a layer's backward runs under ``layer``, what it computes again comes on top: ``layer`` less
        ``checkpoint``.
        """
        if activation_checkpointing not in ("none", "layer"):
            raise ValueError(f"activation_checkpointing {activation_checkpointing}")
        each = self.checkpoint if activation_checkpointing == "layer" else self.layer
        return self.num_layers * each + self.ends


def activation_bytes(model: ModelConfig, precision: Precision, packed_documents: bool = False) -> ActivationBytes:
    """What ``Transformer(model)`` keeps in training.

    Args:
        precision: as in ``train.precision``.
        packed_documents: the sequence has document starts (the convolutions and the value shift then keep masks).
    """
    residual, compute = ELEMENT_BYTES[precision]
    width, query, key = model.hidden_size, model.query_size, model.key_size
    out_and_lse = compute * query + WIDE * model.num_query_heads
    return ActivationBytes(
        norms=2 * (width * (residual + compute) + WIDE),
        queries_and_keys=_before_attention(model, compute, packed_documents),
        attention=compute * (query + 2 * key) + out_and_lse,
        mlp=3 * compute * model.mlp_size,
        ends=INDEX + WIDE * model.rope_dim + width * residual + WIDE + width * compute,
        checkpoint=width * residual + out_and_lse,
        num_layers=model.num_layers,
    )


def _before_attention(model: ModelConfig, compute: int, packed_documents: bool) -> int:
    """What one layer's way from the projection to attention's queries and keys keeps."""
    latent = model.query_size + model.key_size
    projection = compute * (latent + model.key_size)  # kept whole where anything keeps a part of it
    rotates = model.rope_dim > 0
    if model.attention == "gqa":
        # Without rotation, attention's queries and keys are a part of the projection.
        return 0 if rotates else compute * model.key_size
    total = 0
    if model.use_convs:
        second_taps = model.conv_kernel_sizes[1]
        total += compute * latent if model.halo_rows else projection
        total += compute * second_taps * latent
        total += model.halo_rows if packed_documents else 0
    if model.use_value_shift and packed_documents:
        total += 1
    if model.use_qk_norm:
        total += WIDE * (model.num_query_heads + model.num_key_heads)
        if model.use_qk_mean:
            total += WIDE * latent
        else:
            total += compute * latent if model.use_convs else projection
    elif not (model.use_qk_mean or model.use_convs or rotates):
        total += compute * model.key_size
    return total


def cast_weight_bytes(model: ModelConfig, precision: Precision) -> int:
    """Copies of the layers' matrices in the compute dtype that autocast keeps for backward; on every rank."""
    if precision != "bf16_autocast":
        return 0
    count = count_parameters(model)
    return ELEMENT_BYTES[precision][1] * (count.projections + count.convolutions + count.mlp)


def head_gradient_bytes(model: ModelConfig) -> int:
    """The gradient of the head, which the loss holds in fp32 from its forward until backward; on every rank."""
    if model.vocab_size is None:
        raise ValueError("vocab_size is not set")
    return WIDE * model.vocab_size * model.hidden_size


def logits_bytes(model: ModelConfig, precision: Precision, chunk_size: int) -> int:
    """At the peak of one chunk of the loss: logits in fp32 and their gradient as matrix products read it."""
    if model.vocab_size is None:
        raise ValueError("vocab_size is not set")
    compute = ELEMENT_BYTES[precision][1]
    return (WIDE + (compute if compute != WIDE else 0)) * chunk_size * model.vocab_size
