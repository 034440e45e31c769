"""A run's settings, one frozen section per concern, and the table of combinations that are refused."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hydra_dist.config.model import ModelConfig
from hydra_dist.config.types import Count, CountOrZero, Decay, Fraction, Section, Tokens


class DataConfig(Section):
    """What is trained on: a folder that ``hydra-dist data prepare`` wrote."""

    directory: str
    sequence_length: Tokens = 8192
    """Tokens of one packed row, over all ranks that share it."""


class ContextConfig(Section):
    """How one sequence is spread over ranks."""

    size: Count = 1
    """Ranks that share one sequence."""
    strategy: Literal["ring"] = "ring"
    layout: Literal["zigzag", "contiguous"] = "zigzag"
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """How long a rank waits for another before the run ends with an error."""


class ZeroConfig(Section):
    """DeepSpeed ZeRO over all data x context ranks."""

    stage: Literal[0, 1, 2, 3] = 1


class OptimizerConfig(Section):
    """Weight decay acts on matrices only."""

    name: Literal["adamw", "muon"] = "adamw"
    """``muon``: orthogonalised momentum for the matrices of the layers, AdamW for everything else."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """Peak rate of AdamW."""
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.95), strict=False)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0
    """Largest global norm of the gradient; 0 switches clipping off."""
    muon_learning_rate: Annotated[float, Field(gt=0)] = 0.02
    """Peak rate of Muon."""
    muon_momentum: Decay = 0.95


class ScheduleConfig(Section):
    """Linear warm-up, then the learning rate follows ``name`` down to ``final_fraction`` of its peak."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: CountOrZero = 100
    decay_fraction: Fraction = 0.2
    """Last part of the steps in which ``wsd`` falls linearly."""
    final_fraction: Fraction = 0.1


class TrainConfig(Section):
    """The loop."""

    steps: Count = 1000
    seed: CountOrZero = 0
    micro_batch_size: Count = 1
    """Sequences at a time on one data replica."""
    gradient_accumulation_steps: Count = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "bf16_autocast"] = "auto"
    """``bf16``: parameters and gradients in bf16 with fp32 masters in ZeRO; ``bf16_autocast``: fp32 parameters,
    matrix products in bf16; ``auto``: fp32 on CPU, bf16 on a GPU (bf16_autocast with ZeRO stage 0)."""
    activation_checkpointing: Literal["none", "layer"] = "none"
    """``layer`` keeps each layer's input and its attention result, and recomputes the rest in backward."""
    compile: bool = False
    """Each layer through torch.compile: fewer and larger kernels, for a pause at the first steps. Numbers differ from
    those without it by rounding."""
    loss_chunk_size: Count = 2048
    """Tokens whose logits exist at once."""


class EvaluateConfig(Section):
    """Held-out bits per byte and loss by position."""

    every_steps: CountOrZero = 0
    """0: only at the end."""
    max_rows: Count | None = None
    """None: the whole held-out split."""


class CheckpointConfig(Section):
    every_steps: CountOrZero = 0
    """0: only at the end."""
    keep: Count = 2
    """How many of the newest stay."""


class RunConfig(Section):
    """Where a run writes, and what it shows."""

    directory: str
    log_every_steps: Count = 1
    tensorboard: bool = True


class Config(Section):
    """One training run."""

    model: ModelConfig
    data: DataConfig
    run: RunConfig
    context: ContextConfig = ContextConfig()
    zero: ZeroConfig = ZeroConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _parts_agree(self) -> "Config":
        pieces = self.context.size * (2 if self.context.layout == "zigzag" and self.context.size > 1 else 1)
        if self.data.sequence_length < pieces:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} is shorter than the {pieces} pieces that "
                f"context.size {self.context.size} with layout {self.context.layout} cuts it into; "
                f"data.sequence_length {pieces} or more works"
            )
        for refusal in UNSUPPORTED:
            if refusal.applies(self):
                raise ValueError(refusal.message())
        return self


@dataclass(frozen=True)
class Refusal:
    """A combination that is refused when it is read."""

    combination: str
    """The settings, as a user writes them."""
    applies: Callable[[Config], bool]
    reason: str
    instead: tuple[str, ...]
    """``key=value`` changes, each of which makes the configuration work."""

    def message(self) -> str:
        return f"{self.combination}: {self.reason}; {' or '.join(self.instead)} works"


UNSUPPORTED: tuple[Refusal, ...] = (
    Refusal(
        "train.precision bf16 with zero.stage 0",
        lambda c: c.train.precision == "bf16" and c.zero.stage == 0,
        "DeepSpeed would put another optimizer in the place of the one asked for",
        ("zero.stage=1", "train.precision=bf16_autocast"),
    ),
    Refusal(
        "train.compile true with zero.stage 3",
        lambda c: c.train.compile and c.zero.stage == 3,
        "stage 3 gathers each layer's parameters from outside of what is compiled",
        ("zero.stage=2", "train.compile=false"),
    ),
    Refusal(
        "optimizer.name muon with zero.stage 3",
        lambda c: c.optimizer.name == "muon" and c.zero.stage == 3,
        "stage 3 cuts every matrix over all ranks, and Muon needs whole ones",
        ("zero.stage=2", "optimizer.name=adamw"),
    ),
)
"""What is refused, in one place; the README shows this table and a test proves every row and every suggestion."""
