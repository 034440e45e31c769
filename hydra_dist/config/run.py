"""A run's settings, one frozen section per concern, and the table of combinations that are refused."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hydra_dist.config.context import ContextConfig, check_context
from hydra_dist.config.model import ModelConfig
from hydra_dist.config.types import Count, CountOrZero, Decay, Fraction, Section, Tokens


class DataConfig(Section):
    """What is trained on: a folder that ``hydra-dist data prepare`` wrote."""

    directory: str
    sequence_length: Tokens = 8192
    """Tokens of one packed row, over all ranks that share it."""


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
    share_gpu: bool = False
    """Processes beyond the GPUs of a machine share them, over gloo and host memory: many ranks tried on one GPU,
    slowly."""
    precision: Literal["auto", "fp32", "bf16", "bf16_autocast"] = "auto"
    """``bf16``: parameters and gradients in bf16 with fp32 masters in ZeRO; ``bf16_autocast``: fp32 parameters,
    matrix products in bf16; ``auto``: fp32 on CPU, bf16 on a GPU (bf16_autocast with ZeRO stage 0)."""
    activation_checkpointing: Literal["none", "layer"] = "none"
    """``layer`` keeps each layer's input and its attention result, and recomputes the rest in backward."""
    activation_offload: bool = False
    """Under ``layer`` on a GPU: what the layers keep waits in pinned host memory between forward and backward, moved
    beside the computation; at most two layers' share is on the GPU. The host holds, for every rank on it, what the GPU
    would have held otherwise."""
    compile: bool = False
    """Each layer through torch.compile: fewer and larger kernels, for a pause at the first steps. Numbers differ from
    those without it by rounding."""
    loss_chunk_size: Count = 2048
    """Tokens whose logits exist at once."""
    mlp_tile_size: Count | None = None
    """Tokens, over the micro-batch, whose gate and up exist at once in a layer's MLP, forward and backward; backward
    computes them again, for two ninths more work in the MLP (``activation_checkpointing: layer`` does so in any case).
    None: all of them. A few thousand keep a GPU busy."""


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
        check_context(self.context, self.model, self.data.sequence_length)
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


def _reads_row_before(model: ModelConfig) -> bool:
    return any(layer.attention == "ccgqa" and (layer.halo_rows > 0 or layer.use_value_shift) for layer in model.layers)


UNSUPPORTED: tuple[Refusal, ...] = (
    Refusal(
        "context.layout striped with model.attention ccgqa",
        lambda c: c.context.layout == "striped" and _reads_row_before(c.model),
        "its convolutions or its value shift read the row before each row, which another rank then holds",
        ("context.layout=zigzag", "context.layout=contiguous"),
    ),
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
        "train.activation_offload true with train.activation_checkpointing none",
        lambda c: c.train.activation_offload and c.train.activation_checkpointing == "none",
        "what is moved to the host is what checkpointed layers keep",
        ("train.activation_checkpointing=layer", "train.activation_offload=false"),
    ),
    Refusal(
        "train.activation_offload true with train.activation_checkpointing layer with train.device cpu",
        lambda c: c.train.activation_offload and c.train.device == "cpu",
        "the memory of a CPU run is the host's already",
        ("train.activation_offload=false",),
    ),
    Refusal(
        "train.activation_offload true with train.activation_checkpointing layer with train.compile true",
        lambda c: c.train.activation_offload and c.train.compile,
        "compiled layers keep their activations inside compiled code, where none can be moved",
        ("train.compile=false", "train.activation_offload=false"),
    ),
    Refusal(
        "optimizer.name muon with zero.stage 3",
        lambda c: c.optimizer.name == "muon" and c.zero.stage == 3,
        "stage 3 cuts every matrix over all ranks, and Muon needs whole ones",
        ("zero.stage=2", "optimizer.name=adamw"),
    ),
)
"""What is refused, in one place; the README shows this table and a test proves every row and every suggestion."""
