"""An attention layer and a whole block over many ranks, as modules of a plain PyTorch model.

A module holds its projections and the ranks that it shares sequences with. It works on local rows: a plan says which
they are, and its ``shard`` takes them out of a whole tensor. The gradient of a parameter on one rank is the part that
its rows make: add them up over ranks.

Modules of one model should share one ``ContextParallel``: each one that is made from a DeviceMesh makes communicators.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from hydra_dist.config import ModelConfig
from hydra_dist.context import ContextParallel, SequencePlan
from hydra_dist.context.mesh import AnyMesh
from hydra_dist.errors import ConfigError, nearest
from hydra_dist.model import CCGQA, initialize
from hydra_dist.model.transformer import Block, attention_layer

Ranks = AnyMesh | ContextParallel
"""Those that share a sequence: a mesh, as for ``ContextParallel``, one that was made already, or None: one device."""


@dataclass(frozen=True)
class ContextParallelAttentionConfig:
    """Of a layer or a block.

    Attributes:
        hidden_size: model width E.
        num_query_heads, num_key_heads, head_dim: Hq, Hk and D; None: as many key heads as query heads, and E / Hq.
        attention: ``gqa``, or ``ccgqa`` for attention in a compressed latent, behind convolutions.
        window: tokens that a row sees, itself included; None: all before it.
        strategy, layout, inner_ring: as for ``hydra_dist.context.ContextParallel``.
        timeout: seconds that a rank waits for another one, where a module makes its own ``ContextParallel``.
        mlp_expansion: width of a block's MLP over E.
        seed, init_std: of the starting values, which are the same on all ranks.
        settings: anything else that ``hydra_dist.config.ModelConfig`` knows, such as ``{"rope_theta": 5e5}``.

    Everything is checked when a module is made from it.
    """

    hidden_size: int
    num_query_heads: int
    num_key_heads: int | None = None
    head_dim: int | None = None
    attention: str = "gqa"
    window: int | None = None
    strategy: str = "ring"
    layout: str = "zigzag"
    inner_ring: int | None = None
    timeout: float | None = None
    mlp_expansion: float = 8 / 3
    seed: int = 0
    init_std: float = 0.02
    settings: tuple[tuple[str, Any], ...] | dict[str, Any] = ()

    def layer(self) -> ModelConfig:
        """The same as the configuration of one layer of a model.

        Raises:
            ConfigError: settings that do not go together.
        """
        if self.head_dim is None and self.hidden_size % self.num_query_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_query_heads {self.num_query_heads}; "
                f"a head_dim of your own works"
            )
        try:
            return ModelConfig.model_validate(
                {
                    "num_layers": 1,
                    "hidden_size": self.hidden_size,
                    "num_query_heads": self.num_query_heads,
                    "num_key_heads": self.num_query_heads if self.num_key_heads is None else self.num_key_heads,
                    "head_dim": self.hidden_size // self.num_query_heads if self.head_dim is None else self.head_dim,
                    "attention": self.attention,
                    "window": self.window,
                    "mlp_expansion": self.mlp_expansion,
                    **dict(self.settings),
                }
            ).layers[0]
        except ValueError as error:
            raise ConfigError(str(error)) from None


def context_of(
    ranks: Ranks, strategy: str, layout: str, inner_ring: int | None, timeout: float | None
) -> ContextParallel:
    """The ranks of a module.

    Raises:
        ConfigError: a ``ContextParallel`` that shares sequences in another way.
    """
    if not isinstance(ranks, ContextParallel):
        return ContextParallel(ranks, strategy, layout, timeout, inner_ring)
    for name, wanted in (("strategy", strategy), ("layout", layout), ("inner_ring", inner_ring)):
        found = getattr(ranks, name)
        if found != wanted:
            raise ConfigError(
                f"{name} {wanted}: the ContextParallel that was passed in has {name} {found}; the same for both works"
            )
    return ranks


class _OverRanks(nn.Module):
    """What layers and blocks share: the ranks, and plans for sequences over them."""

    def __init__(self, config: ContextParallelAttentionConfig, mesh: Ranks) -> None:
        super().__init__()
        self.config = config
        self.context = context_of(mesh, config.strategy, config.layout, config.inner_ring, config.timeout)

    def plan(self, sequence_length: int, document_starts: Tensor | None = None) -> SequencePlan:
        """Who holds which rows of a batch (``ContextParallel.plan``); all layers of a model take the same plan."""
        return self.context.plan(sequence_length, document_starts)

    def _plan_for(self, x: Tensor, seq: SequencePlan | None) -> SequencePlan:
        if seq is not None:
            return seq
        context = self.context
        rows = torch.tensor([x.shape[1]], device=context.device)
        held = [torch.empty_like(rows) for _ in range(context.size)]
        context.wires.all.all_gather(held, rows, direction="forward", kind="rows").wait()
        lengths = [int(number) for number in held]
        found = context.plan(sum(lengths), device=x.device)
        if found.geometry.lengths != lengths:
            raise ValueError(
                f"x has {lengths} rows on the ranks, and layout {context.layout} deals {sum(lengths)} rows as "
                f"{found.geometry.lengths}; pass a plan of the sequence as seq, and the rows that its shard gives"
            )
        return found


class ContextParallelAttention(_OverRanks):
    """Causal attention over a sequence that is spread over ranks, with its projections, [B, S_local, E] in and out.

    Args:
        config: its shape, and how ranks share the sequence.
        mesh: as for ``ContextParallel``, or a ``ContextParallel`` that several modules share; None: one device.
    """

    def __init__(self, config: ContextParallelAttentionConfig, mesh: Ranks = None) -> None:
        super().__init__(config, mesh)
        self.attention = attention_layer(config.layer())
        initialize(self.attention, config.seed, init_std=config.init_std)

    def forward(self, x: Tensor, seq: SequencePlan | None = None) -> Tensor:
        """[B, S_local, E] -> [B, S_local, E].

        Args:
            seq: from ``plan``. None: one document of all ranks' rows, whose number every call asks the ranks for.

        Raises:
            ValueError: no plan, and rows that the layout would deal otherwise.
        """
        out: Tensor = self.attention(x, self._plan_for(x, seq))
        return out


class ContextParallelAttentionBlock(_OverRanks):
    """x + attention(norm(x)), then x + mlp(norm(x)), over ranks; [B, S_local, E] in and out."""

    def __init__(self, config: ContextParallelAttentionConfig, mesh: Ranks = None) -> None:
        super().__init__(config, mesh)
        self.block = Block(config.layer())
        initialize(self.block, config.seed, init_std=config.init_std)

    def forward(self, x: Tensor, seq: SequencePlan | None = None) -> Tensor:
        """[B, S_local, E] -> [B, S_local, E]; see ``ContextParallelAttention``."""
        out: Tensor = self.block(x, self._plan_for(x, seq), None)
        return out


def create_context_parallel_attention(
    hidden_size: int, num_query_heads: int, mesh: Ranks = None, **settings: Any
) -> ContextParallelAttention:
    """A layer from keywords: those of ``ContextParallelAttentionConfig``, or of ``ModelConfig``.

    Raises:
        ConfigError: an unknown keyword, or values that do not go together.
    """
    config = config_from(ContextParallelAttentionConfig, hidden_size, num_query_heads, settings)
    return ContextParallelAttention(config, mesh)


def config_from(
    kind: type[ContextParallelAttentionConfig], hidden_size: int, num_query_heads: int, settings: dict[str, Any]
) -> ContextParallelAttentionConfig:
    """A configuration from keywords, of which those that only ``ModelConfig`` knows go to ``settings``."""
    own = {field.name for field in fields(kind) if field.init}
    model = set(ModelConfig.model_fields) - {"num_layers", "hidden_size", "vocab_size"}
    for name in settings:
        if name not in own | model:
            raise ConfigError(f"{name}: unknown setting{nearest(name, sorted(own | model))}")
    config = kind(hidden_size, num_query_heads, **{name: value for name, value in settings.items() if name in own})
    rest = {name: value for name, value in settings.items() if name not in own}
    return replace(config, settings={**dict(config.settings), **rest}) if rest else config


class CCGQAAttention(CCGQA):
    """``hydra_dist.model.CCGQA`` with its parameters set: the layer alone, for one device or with a plan as ``seq``.

    Args:
        seed, init_std: of the starting values.
        Everything else as for ``CCGQA``.
    """

    def __init__(self, *args: Any, seed: int = 0, init_std: float = 0.02, **settings: Any) -> None:
        super().__init__(*args, **settings)
        initialize(self, seed, init_std=init_std)
