"""What decides the memory of a Megatron-LM run beside the model's shape: how it is split, stored and recomputed.

Fields follow Megatron-LM's own options under plainer names; ``megatron_arguments`` reads the options themselves.
"""

from dataclasses import dataclass
from typing import Literal

from hydra_dist.errors import ConfigError
from hydra_dist.memory.shapes import DenseDecoder

MIB = 2**20

Module = Literal["core_attn", "layernorm", "mlp"]
Attention = Literal["flash", "fused", "unfused", "local"]
"""Who computes attention: flash-attn, cuDNN, Transformer Engine's products and softmax, or Megatron's own."""

WORKSPACES = {"A100": (4 * MIB, 8_320 * 1024), "H100": (32 * MIB, 32 * MIB), "GB200": (32 * MIB, 32 * MIB)}
"""Workspace of Transformer Engine's products, and torch's default for one cuBLAS handle: bytes, by GPU.

Source: Transformer Engine's ``get_cublas_workspace_size_bytes`` and torch's ``parseChosenWorkspaceSize``.
"""
OVERLAP_STREAMS = 3
"""Workspaces of Transformer Engine for products that overlap with their communication (its ``_NUM_MAX_UB_STREAMS``)."""
ALIKE = {
    "A800": "A100",
    "H20": "H100",
    "H200": "H100",
    "H800": "H100",
    "GH200": "H100",
    "B200": "GB200",
    "B300": "GB200",
    "GB300": "GB200",
}


@dataclass(frozen=True)
class MegatronSettings:
    """How Megatron-LM runs a model. Raises ConfigError for what contradicts itself."""

    sequence_length: int
    """Tokens of a whole sequence."""
    micro_batch_size: int = 1
    num_micro_batches: int = 1
    """A step, on one data-parallel rank."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    num_model_chunks: int = 1
    """Virtual pipeline stages on one rank; 1: no interleaving."""
    micro_batch_group_size: int | None = None
    """Micro-batches of one chunk in a row under interleaving; None: ``pipeline_parallel_size``."""
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    """Layers of the first and the last pipeline stage where they differ from the others'."""
    embedding_counts_as_layer: bool = False
    loss_counts_as_layer: bool = False
    """In the split of layers over stages."""
    context_parallel_size: int = 1
    data_parallel_size: int = 1
    """Without context parallelism."""
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    num_optimizer_instances: int = 1
    """Groups of ranks that each hold the whole distributed optimizer."""
    precision: Literal["bf16", "fp16"] = "bf16"
    gradient_bytes: int | None = None
    """Of an element of the gradient buffer; None: 4 under bf16 (sums in fp32), 2 under fp16."""
    main_parameter_bytes: int = 4
    """Of the optimizer's own copy of a parameter; 2: what its bf16 parameter leaves out."""
    moment_bytes: tuple[int, int] = (4, 4)
    """Of an element of Adam's first and second moment."""
    fp8: bool = False
    """Linear layers multiply in 8 bits, and keep what they read in 8 bits."""
    fp8_parameters: bool = False
    """Under ``fp8``: their parameters are kept in 8 bits alone, not in 16 bits with copies in 8."""
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_modules: tuple[Module, ...] = ("core_attn",)
    """selective: what is computed again."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    recompute_num_layers: int = 1
    """uniform: layers of a block that is recomputed at once; block: layers of each chunk that are recomputed."""
    transformer_engine: bool = True
    attention: Attention = "fused"
    fused_softmax: bool = True
    """Scale, mask and softmax in one kernel, where scores are kept at all."""
    attention_dropout: float = 0.1
    hidden_dropout: float = 0.1
    fused_activation: bool = True
    """The activation of a gated MLP computes what it needs again in its backward."""
    cross_entropy: Literal["plain", "fused", "te", "copied"] = "plain"
    """Megatron's own over a split vocabulary; the same compiled; Transformer Engine's; the first form of the plain one,
    which widened the logits twice (releases of 2023)."""
    attention_mask: bool = True
    """The data loader makes an attention mask, which flash and fused attention do not read."""
    gpu: str = "H100"
    cublas_workspace: int | None = None
    """Bytes of torch's workspace a cuBLAS handle, as CUBLAS_WORKSPACE_CONFIG sets it; None: the GPU's default."""
    tensor_parallel_overlap: bool = False
    """Tensor parallelism's communication overlaps with products inside Transformer Engine."""
    gradient_accumulation_fusion: bool = True
    """Products add weight gradients to the fp32 buffer themselves; autograd gets an empty gradient instead."""
    deferred_head_gradients: int | None = None
    """Micro-batches whose logit gradients wait for the head's weight gradient after the step; 0: of all; None: none."""
    vocab_multiple: int = 128
    """The vocabulary is padded to a multiple of this times ``tensor_parallel_size``."""

    def __post_init__(self) -> None:
        for name in ("sequence_length", "micro_batch_size", "num_micro_batches", "data_parallel_size"):
            self._at_least_one(name)
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size", "num_model_chunks"):
            self._at_least_one(name)
        if self.sequence_length % self.context_parallel_size:
            raise ConfigError(
                f"megatron.sequence_length {self.sequence_length} is not a multiple of megatron.context_parallel_size "
                f"{self.context_parallel_size}; context_parallel_size 1 works"
            )
        ranks = self.data_parallel_size * self.context_parallel_size
        if self.num_optimizer_instances < 1 or ranks % self.num_optimizer_instances:
            raise ConfigError(
                f"megatron.num_optimizer_instances {self.num_optimizer_instances} does not divide the {ranks} ranks of "
                "data and context parallelism; 1 works"
            )
        if self.gpu_kind not in WORKSPACES:
            known = ", ".join([*WORKSPACES, *ALIKE])
            raise ConfigError(f"megatron.gpu {self.gpu} is not known; {known} are")

    def _at_least_one(self, name: str) -> None:
        if getattr(self, name) < 1:
            raise ConfigError(f"megatron.{name} {getattr(self, name)} is not positive; 1 works")

    @property
    def gpu_kind(self) -> str:
        return ALIKE.get(self.gpu, self.gpu)

    @property
    def tokens(self) -> int:
        """Of one micro-batch on this rank's share of the sequence."""
        return self.micro_batch_size * self.sequence_length // self.context_parallel_size

    @property
    def residual_tokens(self) -> int:
        """Tokens of the residual stream on one rank: a tensor-parallel rank's share under sequence parallelism."""
        return self.tokens // (self.tensor_parallel_size if self.sequence_parallel else 1)

    @property
    def optimizer_shards(self) -> int:
        """Ranks that share one copy of the optimizer's state."""
        if not self.distributed_optimizer:
            return 1
        return self.data_parallel_size * self.context_parallel_size // self.num_optimizer_instances

    def padded_vocab(self, model: DenseDecoder) -> int:
        multiple = self.vocab_multiple * self.tensor_parallel_size
        return -(-model.vocab_size // multiple) * multiple

    def chunk_layers(self, model: DenseDecoder) -> tuple[tuple[int, ...], ...]:
        """Layers of each model chunk of each pipeline stage. Raises ConfigError where they cannot be dealt."""
        stages, chunks = self.pipeline_parallel_size, self.num_model_chunks
        extra = int(self.embedding_counts_as_layer), int(self.loss_counts_as_layer)
        ends = {0: self.first_stage_layers, stages - 1: self.last_stage_layers} if stages > 1 else {}
        given = {stage: count for stage, count in ends.items() if count is not None}
        left, between = model.num_layers + sum(extra) - sum(given.values()), stages - len(given)
        counts = [given.get(stage, left // between if between else 0) for stage in range(stages)]
        if sum(counts) != model.num_layers + sum(extra) or any(count % chunks for count in counts):
            raise ConfigError(
                f"model.num_layers {model.num_layers} cannot be dealt to megatron.pipeline_parallel_size {stages} x "
                f"num_model_chunks {chunks}; pipeline_parallel_size 1 with num_model_chunks 1 works"
            )
        dealt = [[count // chunks] * chunks for count in counts]
        dealt[0][0] -= extra[0]
        dealt[-1][-1] -= extra[1]
        return tuple(tuple(stage) for stage in dealt)

    def stage_layers(self, model: DenseDecoder, stage: int) -> int:
        """Of one pipeline stage, over all its chunks."""
        return sum(self.chunk_layers(model)[stage])
