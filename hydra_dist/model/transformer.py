"""The decoder-only language model: embedding, pre-norm blocks of attention and MLP, final norm, head.

It computes on local rows and knows no ranks: what a layer needs of other rows it asks ``seq`` for. The residual stream
has the embedding's dtype, so it is fp32 under autocast while the matrix products and what they read are bf16.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hydra_dist.config import ModelConfig
from hydra_dist.context import SAVED_BY_CHECKPOINT
from hydra_dist.errors import ConfigError, nearest
from hydra_dist.model.ccgqa import CCGQA
from hydra_dist.model.gqa import GQA
from hydra_dist.model.loss import Head
from hydra_dist.model.mlp import MLP
from hydra_dist.model.norm import RMSNorm
from hydra_dist.model.offload import ActivationOffload, Host
from hydra_dist.model.rope import Rope, rope_tables
from hydra_dist.model.sequence import LocalSequence, WholeSequence

ACTIVATION_CHECKPOINTING = ("none", "layer")


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); ``config`` is one of ``ModelConfig.layers``."""

    def __init__(self, config: ModelConfig, mlp_tile_size: int | None = None) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = attention_layer(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config.hidden_size, config.mlp_size, mlp_tile_size)

    def forward(self, x: Tensor, seq: LocalSequence, rope: Rope | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), seq, rope)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """The language model of a ``ModelConfig``; its parameters are to be set by ``initialize`` or a checkpoint.

    Args:
        config: with ``vocab_size`` set.
        activation_checkpointing: ``none``, or ``layer``: keep each layer's input and its attention result (so that no
            rank's keys travel twice), and compute the rest again in backward.
        loss_chunk_size: tokens whose logits exist at once.
        mlp_tile_size: tokens whose gate and up exist at once in a layer's MLP; None: all of them.
        offload_to: where what the layers keep under ``layer`` goes between forward and backward; None: it stays.

    Raises:
        ConfigError: no vocab_size, an unknown activation_checkpointing, or offload without ``layer``.
    """

    def __init__(
        self,
        config: ModelConfig,
        activation_checkpointing: str = "none",
        loss_chunk_size: int = 2048,
        mlp_tile_size: int | None = None,
        offload_to: Host | None = None,
    ) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ConfigError("model.vocab_size is not set; the number of the tokenizer's entries works")
        if activation_checkpointing not in ACTIVATION_CHECKPOINTING:
            raise ConfigError(
                f"activation_checkpointing {activation_checkpointing}: {' or '.join(ACTIVATION_CHECKPOINTING)} works"
                + nearest(activation_checkpointing, ACTIVATION_CHECKPOINTING)
            )
        if offload_to is not None and activation_checkpointing != "layer":
            raise ConfigError(
                f"activations are moved to the host only from layers that are checkpointed, and "
                f"activation_checkpointing is {activation_checkpointing}; layer works"
            )
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.offload = None if offload_to is None else ActivationOffload(offload_to, SAVED_BY_CHECKPOINT)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(layer, mlp_tile_size) for layer in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = Head(config.vocab_size, config.hidden_size, loss_chunk_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self._plain, self._checkpointed = _plain, _checkpointed

    def forward(
        self,
        tokens: Tensor,
        seq: LocalSequence | None = None,
        targets: Tensor | None = None,
        reduction: str = "sum",
    ) -> Tensor:
        """Logits, or the loss of ``targets``.

        Args:
            tokens: [B, S] int, local rows.
            seq: where the local rows stand in the sequence; None: one device, one document.
            targets: [B, S] int, the next token of each row, -100 for rows without loss.
            reduction: ``sum``: the sum of the local rows' losses in nats, a scalar in fp32 (fp64 for fp64).
                ``none``: each row's loss [B, S], without gradient.

        Returns:
            Logits [B, S, V] where targets is None.
        """
        if seq is None:
            seq = WholeSequence(tokens.shape[1], tokens.device)
        return self.head(self.norm(self._hidden(tokens, seq)), targets, reduction)

    def _hidden(self, tokens: Tensor, seq: LocalSequence) -> Tensor:
        x = self.embedding(tokens)
        rope = self.rope(seq.positions.to(x.device), x.dtype)
        checkpointing = self.activation_checkpointing == "layer" and torch.is_grad_enabled()
        if checkpointing and self.offload is not None:
            with self.offload.forward(len(self.layers)) as forward:
                for layer in self.layers:
                    with forward.layer(x) as context_fn:
                        x = _checkpointed(layer, x, seq, rope, context_fn)
            return x
        for layer in self.layers:
            x = (self._checkpointed if checkpointing else self._plain)(layer, x, seq, rope)
        return x

    def compile_layers(self, **options: Any) -> None:
        """Run each layer through torch.compile, whole: a graph break is an error. ``options`` are torch.compile's.

        Compiled code names the plan of a batch and does not hold it: keep it until backward is over.

        Raises ConfigError where activations are moved to the host.
        """
        if self.offload is not None:
            raise ConfigError(
                "compiled layers keep their activations inside compiled code, where none can be moved to the host; "
                "offload without compile, or compile without offload, works"
            )
        # Each kind of layer is traced twice at most: with its first plan's handle as a constant, then with any.
        kinds = len(set(map(repr, self.config.layers)))
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * kinds + 2)
        self._plain = torch.compile(_plain, fullgraph=True, **options)
        self._checkpointed = torch.compile(_checkpointed, fullgraph=True, **options)

    def rope(self, positions: Tensor, dtype: torch.dtype) -> Rope | None:
        """The rotation of rows at global ``positions`` [S], shared by all layers."""
        return rope_tables(positions, self.config.rope_dim, self.config.rope_theta, dtype)


def attention_layer(config: ModelConfig) -> CCGQA | GQA:
    """The attention layer that ``config``, one of ``ModelConfig.layers``, asks for."""
    shape = (config.hidden_size, config.num_query_heads, config.num_key_heads, config.head_dim)
    rows: dict[str, Any] = {
        "rope_dim": config.rope_dim,
        "rope_theta": config.rope_theta,
        "window": config.window,
    }
    if config.attention == "gqa":
        return GQA(*shape, **rows)
    return CCGQA(
        *shape,
        conv_kernel_sizes=config.conv_kernel_sizes,
        use_convs=config.use_convs,
        use_qk_mean=config.use_qk_mean,
        use_qk_norm=config.use_qk_norm,
        use_value_shift=config.use_value_shift,
        temperature=config.temperature,
        use_output_norm=config.use_output_norm,
        norm_eps=config.norm_eps,
        **rows,
    )


def _plain(layer: nn.Module, x: Tensor, seq: LocalSequence, rope: Rope | None) -> Tensor:
    rows: Tensor = layer(x, seq, rope)
    return rows


def _checkpointed(
    layer: nn.Module,
    x: Tensor,
    seq: LocalSequence,
    rope: Rope | None,
    context_fn: Callable[[], Any] | None = None,
) -> Tensor:
    return checkpoint(
        layer,
        x,
        seq,
        rope,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing in a layer is random
        context_fn=context_fn or partial(create_selective_checkpoint_contexts, _keep_attention),
    )


def _keep_attention(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator in SAVED_BY_CHECKPOINT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
