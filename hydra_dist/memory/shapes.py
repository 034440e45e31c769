"""What a dense decoder-only language model is, as far as its memory goes: GPT, Llama and Qwen in one description.

A layer is a norm, self-attention, a norm and an MLP, each of the two added to the residual stream. What a runtime does
with it (how it splits, pads and fuses) is the runtime's affair.
"""

from dataclasses import dataclass
from typing import Literal

from hydra_dist.errors import ConfigError

Norm = Literal["layernorm", "rmsnorm"]
Positions = Literal["learned", "rope", "none"]


@dataclass(frozen=True)
class DenseDecoder:
    """Extents of a dense decoder-only model. Raises ConfigError where they fit no such model."""

    num_layers: int
    hidden_size: int
    ffn_size: int
    """Width of the MLP between its matrices: of gate and of up where it is gated, each."""
    num_query_heads: int
    num_key_heads: int
    head_dim: int
    vocab_size: int
    """As the tokenizer has it; runtimes pad it."""
    max_positions: int
    """Rows of the table of learned positions; without one, the longest sequence the model is meant for."""
    tie_embeddings: bool = True
    gated_mlp: bool = False
    norm: Norm = "layernorm"
    positions: Positions = "learned"
    linear_bias: bool = True
    """Of the output projection and the MLP."""
    qkv_bias: bool | None = None
    """Of the projection to q, k and v; None: as ``linear_bias``."""
    qk_norm: bool = False
    """A norm over each head of q and of k, with weights that heads share."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "ffn_size", "num_query_heads", "num_key_heads", "head_dim"):
            _at_least_one(f"model.{name}", getattr(self, name))
        _at_least_one("model.vocab_size", self.vocab_size)
        _at_least_one("model.max_positions", self.max_positions)
        if self.num_query_heads % self.num_key_heads:
            raise ConfigError(
                f"model.num_query_heads {self.num_query_heads} is not a multiple of model.num_key_heads "
                f"{self.num_key_heads}; {self.num_query_heads} key heads work"
            )

    @property
    def query_size(self) -> int:
        """Width of q over all heads, and of attention's result."""
        return self.num_query_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Width of k over all heads, and of v."""
        return self.num_key_heads * self.head_dim

    @property
    def norm_parameters(self) -> int:
        """Of one norm over the residual stream."""
        return self.hidden_size * (2 if self.norm == "layernorm" else 1)

    @property
    def qk_norm_parameters(self) -> int:
        """Of the two norms over heads, in one layer."""
        return (4 if self.norm == "layernorm" else 2) * self.head_dim if self.qk_norm else 0

    @property
    def mlp_inputs(self) -> int:
        """Width of the MLP's first product: gate and up, or up."""
        return self.ffn_size * (2 if self.gated_mlp else 1)

    @property
    def has_qkv_bias(self) -> bool:
        return self.linear_bias if self.qkv_bias is None else self.qkv_bias


def _at_least_one(key: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{key} {value} is not positive; 1 works")
