"""What decides the memory of a Hugging Face model under DeepSpeed ZeRO beside its shape: splits, offload, kernels.

Defaults are DeepSpeed's own. Every layer is checkpointed (``gradient_checkpointing_enable``), weights are bf16, a
micro-batch is one sequence.
"""

from dataclasses import dataclass
from typing import Literal

from hydra_dist.errors import ConfigError
from hydra_dist.memory.shapes import DenseDecoder

GIB = 2**30
CrossEntropy = Literal["plain", "fused", "chunked"]
"""Of Hugging Face (logits whole, widened to fp32), of Liger (gradients in the forward), or over chunks of tokens."""
GPU_BYTES = {
    "A100-40": 40 * GIB,
    "A100-80": 80 * GIB,
    "H100-80": 81_559 * 2**20,
    "H200": 143_771 * 2**20,
}
"""What the driver reports as the whole (NVML), context and the driver's own share within."""
INDEX_LIMIT = 2**31
"""Elements that a kernel with 32-bit indices reaches."""


@dataclass(frozen=True)
class DeepSpeedSettings:
    """How DeepSpeed runs a model. Raises ConfigError for what contradicts itself."""

    sequence_length: int
    """Tokens of a whole sequence."""
    num_gpus: int = 1
    gpus_per_node: int = 8
    sequence_parallel_size: int = 1
    """Ulysses: ranks that share one sequence."""
    zero_stage: Literal[2, 3] = 3
    offload_parameters: bool = False
    offload_optimizer: bool = False
    offload_checkpoints: bool = False
    """Layer inputs wait for backward in the host's memory."""
    pinned_checkpoints: bool = False
    """They are pinned there: torch's pinned allocator rounds up to powers of two. ArcticTraining's are not."""
    fused_kernels: bool = False
    """Liger's RMSNorm, rotary embedding and, unless ``tiled_mlp``, SwiGLU."""
    flash_attention: Literal[2, 3] = 2
    """Version: they differ in what backward holds where query heads share a key head."""
    wide_indices: bool = True
    """Those kernels index in 64 bits (Liger from 0.6.1 on); otherwise a rank's tokens x width stay below 2^31."""
    cross_entropy: CrossEntropy = "plain"
    loss_chunk: int = 256
    """Tokens of a chunk of ``chunked``."""
    tiled_mlp: bool = False
    """The MLP over ceil(tokens / hidden_size) pieces of a rank's tokens."""
    optimizer_bytes: int = 12
    """A parameter: fp32 copy and Adam's two moments."""
    reduction_bytes: Literal[2, 4] = 2
    """An element of gradients that are summed over ranks; under sequence parallelism DeepSpeed's default is 4."""
    reduce_bucket_size: int = 500_000_000
    allgather_bucket_size: int = 500_000_000
    """Of ZeRO-2, after the optimizer's step."""
    max_reuse_distance: int = 1_000_000_000
    """Elements: ZeRO-3 keeps a gathered parameter that is used again before so many others are."""

    def __post_init__(self) -> None:
        for name in ("sequence_length", "num_gpus", "gpus_per_node", "sequence_parallel_size", "loss_chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"deepspeed.{name} {getattr(self, name)} is not positive; 1 works")
        if self.num_gpus % self.sequence_parallel_size:
            raise ConfigError(
                f"deepspeed.sequence_parallel_size {self.sequence_parallel_size} does not divide deepspeed.num_gpus "
                f"{self.num_gpus}; sequence_parallel_size 1 works"
            )
        if self.offload_parameters and self.zero_stage != 3:
            raise ConfigError(
                f"deepspeed.offload_parameters needs ZeRO-3, zero_stage is {self.zero_stage}; zero_stage 3 works"
            )

    @property
    def tokens(self) -> int:
        """Of one rank."""
        return -(-self.sequence_length // self.sequence_parallel_size)

    @property
    def ranks_per_node(self) -> int:
        return min(self.num_gpus, self.gpus_per_node)

    def key_copies(self, model: DenseDecoder) -> int:
        """How often Ulysses repeats a key head, so that every rank has one. Raises ConfigError for odd splits."""
        split, keys = self.sequence_parallel_size, model.num_key_heads
        if model.num_query_heads % split or (keys % split and split % keys):
            raise ConfigError(
                f"deepspeed.sequence_parallel_size {split} does not split {model.num_query_heads} query heads and "
                f"{keys} key heads; sequence_parallel_size 1 works"
            )
        return max(1, split // keys)
