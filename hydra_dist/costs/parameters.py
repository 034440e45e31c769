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
    mlp: int
    layer_norms: int
    final_norm: int
    head: int
    """0 where it is the embedding."""

    @property
    def layers(self) -> int:
        """What the layers hold."""
        return self.projections + self.convolutions + self.temperatures + self.mlp + self.layer_norms

    @property
    def total(self) -> int:
        return self.embedding + self.layers + self.final_norm + self.head


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Parameters of ``Transformer(model)``.

    A layer's attention has E (e_q + 2 e_k) + e_q E; CCGQA adds (e_q + e_k)(k0 + D k1) taps, 2 (e_q + e_k) biases and
    one temperature a key head. Raises ValueError where ``vocab_size`` is not set.
    """
    if model.vocab_size is None:
        raise ValueError("vocab_size is not set")
    width, layers = model.hidden_size, model.num_layers
    latent = model.query_size + model.key_size
    depthwise_taps, grouped_taps = model.conv_kernel_sizes
    is_ccgqa = model.attention == "ccgqa"
    embedding = model.vocab_size * width
    return ParameterCount(
        embedding=embedding,
        projections=layers * width * (2 * model.query_size + 2 * model.key_size),
        convolutions=(
            layers * latent * (depthwise_taps + model.head_dim * grouped_taps + 2)
            if is_ccgqa and model.use_convs
            else 0
        ),
        temperatures=layers * model.num_key_heads if is_ccgqa and model.use_qk_norm else 0,
        mlp=layers * 3 * width * model.mlp_size,
        layer_norms=layers * 2 * width,
        final_norm=width,
        head=0 if model.tie_embeddings else embedding,
    )
