"""How many parameters a model has, by part."""

from dataclasses import dataclass

from hydra_dist.config import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters, over all layers where a part stands in each; a tied head counts as embedding."""

    embedding: int
    projections: int
    """Attention's projections into the latent (or to q, k and v) and back."""
    convolutions: int
    """Taps and biases of both convolutions."""
    temperatures: int
    output_norms: int
    """Weights of the norms between attention and the projection that leads back."""
    mlp: int
    layer_norms: int
    final_norm: int
    head: int
    """0 where it is the embedding."""

    @property
    def layers(self) -> int:
        """What the layers hold."""
        attention = self.projections + self.convolutions + self.temperatures + self.output_norms
        return attention + self.mlp + self.layer_norms

    @property
    def total(self) -> int:
        return self.embedding + self.layers + self.final_norm + self.head


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Parameters of ``Transformer(model)``.

    A layer's attention has E (e_q + 2 e_k) + e_q E; CCGQA adds (e_q + e_k)(k0 + D k1) taps, 2 (e_q + e_k) biases, one
    temperature a key head, and e_q weights of an output norm. Raises ValueError where ``vocab_size`` is not set.
    """
    if model.vocab_size is None:
        raise ValueError("vocab_size is not set")
    width, layers = model.hidden_size, model.layers
    compressed = [layer for layer in layers if layer.attention == "ccgqa"]
    embedding = model.vocab_size * width
    return ParameterCount(
        embedding=embedding,
        projections=sum(width * (2 * layer.query_size + 2 * layer.key_size) for layer in layers),
        convolutions=sum(_taps_and_biases(layer) for layer in compressed if layer.use_convs),
        temperatures=sum(layer.num_key_heads for layer in compressed if layer.use_qk_norm),
        output_norms=sum(layer.query_size for layer in compressed if layer.use_output_norm),
        mlp=len(layers) * 3 * width * model.mlp_size,
        layer_norms=len(layers) * 2 * width,
        final_norm=width,
        head=0 if model.tie_embeddings else embedding,
    )


def _taps_and_biases(layer: ModelConfig) -> int:
    depthwise_taps, grouped_taps = layer.conv_kernel_sizes
    return (layer.query_size + layer.key_size) * (depthwise_taps + layer.head_dim * grouped_taps + 2)
