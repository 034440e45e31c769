"""Every setting a user may write, one frozen model per concern, and the table of combinations that are refused.

Reading files and turning mistakes into messages is ``config_file.py``; what follows from the settings (parameters,
FLOPs, bytes) is in ``costs/``. No torch here: a laptop that only asks a question loads none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def parse_count(value: Any) -> Any:
    """Read a count of tokens as people write it: ``64K`` is 65,536 and ``1M`` is 1,048,576; anything else passes."""
    if isinstance(value, str) and value[-1:].upper() in UNITS and value[:-1].isdigit():
        return int(value[:-1]) * UNITS[value[-1].upper()]
    return value


Tokens = Annotated[int, BeforeValidator(parse_count), Field(gt=0, lt=2**48)]
Count = Annotated[int, Field(gt=0, lt=2**31)]
CountOrZero = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Strict and frozen: a number in quotes or an unknown key is a mistake, not a guess."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    """The decoder-only transformer.

    Heads are given as counts (``num_query_heads``, ``num_key_heads``), or through compression at an unchanged
    ``head_dim``: query heads = hidden_size / (C1 x head_dim), key heads = hidden_size / (C2 x head_dim).
    """

    vocab_size: Count | None = None
    """Entries of the embedding; None takes the tokenizer's."""
    num_layers: Count = 12
    hidden_size: Count = 768
    """Model width E."""
    attention: Literal["ccgqa", "gqa"] = "ccgqa"
    """``gqa`` with as many key heads as query heads is MHA, with one key head MQA."""
    head_dim: Count = 64
    num_query_heads: Count
    num_key_heads: Count
    compression_factor: Count | None = None
    """C: sets C1 = C2 = C."""
    query_compression: Count | None = None
    """C1; overrides compression_factor for query heads."""
    key_compression: Count | None = None
    """C2; overrides compression_factor for key heads."""
    conv_kernel_sizes: tuple[Count, Count] = Field(default=(2, 2), strict=False)
    """Taps of the depthwise and of the head-grouped causal convolution (CCGQA)."""
    use_convs: bool = True
    induction_layers: tuple[CountOrZero, ...] = Field(default=(), strict=False)
    """CCGQA layers (counted from 0) that start as induction heads: a row attends to what followed earlier rows like it.
    Short runs on long rows then use their context from the first steps. Full layers are the ones to choose."""
    use_qk_mean: bool = True
    use_qk_norm: bool = True
    use_value_shift: bool = True
    window: Count | None = None
    """Sliding window in tokens: a row sees itself and window - 1 rows before it. None: all rows before it."""
    layer_windows: tuple[Count | None, ...] | None = Field(default=None, strict=False, min_length=1)
    """Windows layer by layer, over again where the list is shorter than the layers; overrides ``window``."""
    rope_fraction: Fraction = 0.5
    """Share of each head's dimensions that is rotated."""
    rope_theta: Annotated[float, Field(gt=1)] = 10_000.0
    mlp_expansion: Annotated[float, Field(gt=0, le=64)] = 8 / 3
    """Width of the SwiGLU over hidden_size, rounded up to a multiple of 16."""
    tie_embeddings: bool = True
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    init_std: Annotated[float, Field(gt=0, lt=10)] = 0.02

    @model_validator(mode="before")
    @classmethod
    def _heads_from_compression(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        hidden_size, head_dim = data.get("hidden_size", 768), data.get("head_dim", 64)
        for heads, compression in (("num_query_heads", "query_compression"), ("num_key_heads", "key_compression")):
            key = compression if data.get(compression) is not None else "compression_factor"
            factor = data.get(key)
            if data.get(heads) is not None or not all(isinstance(n, int) and n > 0 for n in (hidden_size, head_dim)):
                continue
            if factor is None:
                factor = 1
            if isinstance(factor, int) and factor > 0:
                if hidden_size % (factor * head_dim):
                    works = [c for c in range(1, hidden_size // head_dim + 1) if hidden_size % (c * head_dim) == 0]
                    raise ValueError(
                        f"model.{key} {factor} leaves hidden_size {hidden_size} / ({factor} x head_dim {head_dim}) "
                        f"heads, which is no integer; {_listing(works)} work"
                        if works
                        else f"model.{key} {factor}: hidden_size {hidden_size} is no multiple of head_dim {head_dim}; "
                        f"model.hidden_size {-(-hidden_size // head_dim) * head_dim} works with a factor of 1"
                    )
                data[heads] = hidden_size // (factor * head_dim)
        return data

    @model_validator(mode="after")
    def _heads_group(self) -> "ModelConfig":
        queries, keys = self.num_query_heads, self.num_key_heads
        if queries % keys:
            below = queries // keys * keys
            query_options = [n for n in (below, below + keys) if n > 0]
            key_options = [n for n in range(keys, 0, -1) if queries % n == 0][:1]
            raise ValueError(
                f"model.num_query_heads {queries} is not a multiple of model.num_key_heads {keys}; "
                f"{_listing(query_options)} query heads, or {_listing(key_options)} key heads, work"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim {self.head_dim} is odd; {self.head_dim + 1} works")
        too_high = [layer for layer in self.induction_layers if layer >= self.num_layers]
        if too_high:
            raise ValueError(
                f"model.induction_layers has {too_high[0]}, and the last of {self.num_layers} layers is "
                f"{self.num_layers - 1}; model.induction_layers=[{self.num_layers - 1}] works"
            )
        if self.induction_layers and not (
            self.attention == "ccgqa" and self.use_convs and self.conv_kernel_sizes[0] > 1
        ):
            raise ValueError(
                "model.induction_layers needs attention ccgqa with use_convs and a first kernel of 2 or more taps, "
                "which bring the row before into the keys; model.induction_layers=[] works"
            )
        if self.attention == "ccgqa" and self.use_value_shift and self.num_key_heads * self.head_dim % 2:
            raise ValueError("model.use_value_shift needs an even num_key_heads x head_dim")
        return self

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of every layer."""
        cycle = self.layer_windows or (self.window,)
        return tuple(cycle[layer % len(cycle)] for layer in range(self.num_layers))

    @property
    def queries_per_key(self) -> int:
        """Group size g."""
        return self.num_query_heads // self.num_key_heads

    @property
    def query_size(self) -> int:
        """Width e_q of all query heads."""
        return self.num_query_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Width e_k of all key (and of all value) heads."""
        return self.num_key_heads * self.head_dim

    @property
    def rope_dim(self) -> int:
        """Dimensions of a head that are rotated: even."""
        return int(self.head_dim * self.rope_fraction) // 2 * 2

    @property
    def mlp_size(self) -> int:
        """Hidden width of the MLP."""
        return -(-round(self.hidden_size * self.mlp_expansion) // 16) * 16

    @property
    def halo_rows(self) -> int:
        """Rows before a chunk that the convolutions read."""
        return sum(self.conv_kernel_sizes) - 2 if self.attention == "ccgqa" and self.use_convs else 0


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
        "optimizer.name muon with zero.stage 3",
        lambda c: c.optimizer.name == "muon" and c.zero.stage == 3,
        "stage 3 cuts every matrix over all ranks, and Muon needs whole ones",
        ("zero.stage=2", "optimizer.name=adamw"),
    ),
)
"""What is refused, in one place; the README shows this table and a test proves every row and every suggestion."""


def _listing(options: list[int]) -> str:
    return " or ".join(str(option) for option in options)
