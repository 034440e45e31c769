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
"""fp32: row statistics, lse, rotation tables."""
TOKEN = 8
"""A token id."""
AGE = 4
"""Rows of its document before a row."""


@dataclass(frozen=True)
class LayerBytes:
    """What one layer keeps between forward and backward, bytes per local token."""

    norms: int
    """What goes into norms and what comes out: of attention's and of the MLP's, and of an output norm the latter."""
    queries_and_keys: int
    """What leads to attention's queries and keys; CCGQA: the whole projection and one number a head."""
    attention: int
    """q, k, v, out and lse."""
    mlp: int
    """Gate, up and their product; nothing where the MLP runs in tiles."""
    checkpoint: int
    """All that is kept under ``activation_checkpointing: layer``: the layer's input and its attention result."""

    @property
    def total(self) -> int:
        """Without checkpointing."""
        return self.norms + self.queries_and_keys + self.attention + self.mlp


@dataclass(frozen=True)
class ActivationBytes:
    """Kept between forward and backward, bytes per local token."""

    layers: tuple[LayerBytes, ...]
    ends: int
    """Once a model: token ids, documents, rotation tables, final norm, and the loss's gradient, which forward
    computes."""

    def total(self, activation_checkpointing: str, activation_offload: bool = False) -> int:
        """After forward, over all layers. Under ``layer``, ``again`` comes on top during backward.

        With ``activation_offload``, the most that is on the device at a time: two neighbouring layers.
        """
        if activation_checkpointing not in ("none", "layer"):
            raise ValueError(f"activation_checkpointing {activation_checkpointing}")
        if activation_checkpointing == "none":
            if activation_offload:
                raise ValueError("activation_offload without activation_checkpointing layer")
            return sum(layer.total for layer in self.layers) + self.ends
        kept = [layer.checkpoint for layer in self.layers]
        if activation_offload:
            return max(sum(kept[index : index + 2]) for index in range(len(kept))) + self.ends
        return sum(kept) + self.ends

    @property
    def on_host(self) -> int:
        """Under ``activation_offload``, in this rank's pinned host buffers, before each is rounded up to 2^n bytes."""
        return sum(layer.checkpoint for layer in self.layers[:-1])

    @property
    def again(self) -> int:
        """Under ``layer``, what the layer with the most of it computes again while its backward runs."""
        return max(layer.total - layer.checkpoint for layer in self.layers)


def activation_bytes(
    model: ModelConfig, precision: Precision, packed_documents: bool = False, mlp_tiles: bool = False
) -> ActivationBytes:
    """What ``Transformer(model)`` keeps in training.

    Args:
        precision: as in ``train.precision``.
        packed_documents: the sequence has document starts, of which CCGQA layers share one number a row.
        mlp_tiles: ``train.mlp_tile_size`` is set.
    """
    residual, compute = ELEMENT_BYTES[precision]
    width, layers = model.hidden_size, model.layers
    ages = AGE if packed_documents and any(layer.attention == "ccgqa" for layer in layers) else 0
    return ActivationBytes(
        layers=tuple(_layer_bytes(layer, residual, compute, mlp_tiles) for layer in layers),
        ends=TOKEN + ages + WIDE * model.rope_dim + width * residual + WIDE + width * compute,
    )


def _layer_bytes(layer: ModelConfig, residual: int, compute: int, mlp_tiles: bool) -> LayerBytes:
    width, query, key = layer.hidden_size, layer.query_size, layer.key_size
    out_and_lse = compute * query + WIDE * layer.num_query_heads
    norms = 2 * (width * (residual + compute) + WIDE)
    if layer.attention == "ccgqa" and layer.use_output_norm:
        norms += compute * query + WIDE
    return LayerBytes(
        norms=norms,
        queries_and_keys=_before_attention(layer, compute),
        attention=compute * (query + 2 * key) + out_and_lse,
        mlp=0 if mlp_tiles else 3 * compute * layer.mlp_size,
        checkpoint=width * residual + out_and_lse,
    )


def _before_attention(layer: ModelConfig, compute: int) -> int:
    """What the way from the projection to attention's queries and keys keeps."""
    if layer.attention == "gqa":
        # Without rotation, attention's queries and keys are a part of the projection, which also has the values.
        return 0 if layer.rope_dim > 0 else compute * layer.key_size
    total = compute * (layer.query_size + 2 * layer.key_size)
    if layer.use_qk_norm:
        total += WIDE * (layer.num_query_heads + layer.num_key_heads)
        if layer.temperature == "raw":
            total += compute * layer.key_size  # the keys from before their temperature, which may be zero
    return total


def mlp_tile_bytes(model: ModelConfig, precision: Precision, tile_size: int) -> int:
    """What a layer's MLP in tiles needs while its backward runs, beside the gradient of its input.

    The sums of the weights' gradients in fp32; under autocast the cast weights; and a tile's gate and up twice over
    (themselves and their gradients), their product's gradient and two temporaries, or, where that is more, the
    gradients of gate and up and one product that is added to the sums.
    """
    residual, compute = ELEMENT_BYTES[precision]
    matrix = model.hidden_size * model.mlp_size
    sums = 3 * WIDE * matrix
    product = 0 if compute == WIDE else 2 * WIDE * matrix
    casts = 0 if compute == residual else 3 * compute * matrix
    tile = compute * tile_size * model.mlp_size
    return sums + casts + max(7 * tile, 2 * tile + product)


def cast_weight_bytes(model: ModelConfig, precision: Precision, mlp_tiles: bool = False) -> int:
    """Copies of the linear layers' matrices in the compute dtype that autocast keeps for backward; on every rank.

    ``mlp_tiles``: ``train.mlp_tile_size`` is set; a tiled MLP casts its weights anew.
    """
    if precision != "bf16_autocast":
        return 0
    count = count_parameters(model)
    return ELEMENT_BYTES[precision][1] * (count.projections + (0 if mlp_tiles else count.mlp))


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
