"""How much memory a Hugging Face model takes under DeepSpeed ZeRO, on a GPU and in its host, and how long it can get.

The GPU's share is one training step played on a model of the allocator (``deepspeed_hf_step``), which gives allocated
and reserved; device adds what lies outside. The terms are read off the code; none is fitted.

Source: DeepSpeed at edaa7221, ArcticTraining at b28638e6; Bekman et al. 2025 (arXiv 2506.13996); measurements are in
``cases``.
"""

from dataclasses import dataclass, replace
from typing import Literal

from hydra_dist.errors import ConfigError
from hydra_dist.memory.deepspeed_hf_settings import GIB, INDEX_LIMIT, DeepSpeedSettings
from hydra_dist.memory.deepspeed_hf_step import HALF, Step, parameters
from hydra_dist.memory.result import NodeMemory, Phase, RankMemory
from hydra_dist.memory.shapes import DenseDecoder

CONTEXT = 2_000_000_000
"""A CUDA context with kernels loaded: 1 to 2 GB by accelerate's documentation; flash-attn's and Triton's are there."""
DRIVER = 564 * 2**20
"""Of an H100's 81,559 MiB, what torch does not see (it reports 79.10 GiB)."""
COMMUNICATOR = GIB // 2
"""Buffers of one NCCL communicator (Fujii et al. 2024, arXiv 2411.06465)."""
FP32 = 4
STEP = 128
"""Lengths are tried in multiples of this on every rank."""
PRECISION = 512
"""The longest is found to its share of one in so many."""

Limit = Literal["gpu", "host", "index"]


@dataclass(frozen=True)
class Longest:
    """The longest sequence that fits, in tokens of the whole sequence, and what a longer one runs out of."""

    sequence_length: int
    limit: Limit
    memory: NodeMemory


def estimate_deepspeed(model: DenseDecoder, settings: DeepSpeedSettings) -> NodeMemory:
    """Memory of every rank (they are alike) and of a node that is full of ranks. Raises ConfigError."""
    check(model, settings)
    step = Step(model, settings)
    allocator = step.play()
    phases = tuple(
        Phase(peak.phase, {name: size for name, size in peak.parts.items() if name not in step.kept})
        for peak in allocator.peaks.values()
    )
    communicators = 1 + (settings.sequence_parallel_size > 1)
    return NodeMemory(
        rank=RankMemory(kept=step.kept, phases=phases, late=0),
        reserved=allocator.reserved,
        outside={"context": CONTEXT, "driver": DRIVER, "communication": communicators * COMMUNICATOR},
        host=host_bytes(model, settings),
    )


def check(model: DenseDecoder, settings: DeepSpeedSettings) -> None:
    """Refuse what cannot run: heads that Ulysses cannot deal, and a model that is no Llama or Qwen."""
    settings.key_copies(model)
    if model.norm != "rmsnorm" or not model.gated_mlp or model.positions != "rope":
        raise ConfigError(
            "model.norm, model.gated_mlp and model.positions must be rmsnorm, true and rope for deepspeed_hf; "
            f"{model.norm}, {model.gated_mlp} and {model.positions} are not estimated"
        )


def host_bytes(model: DenseDecoder, settings: DeepSpeedSettings) -> dict[str, int]:
    """Of one node: layer inputs, and the shards of its ranks with DeepSpeed's own allowance for buffers on top.

    Among the buffers are the bf16 gradients as they arrive; fp32 gradients, which the optimizer reads, are counted.

    Source: DeepSpeed's ``estimate_zero3_model_states_mem_needs`` (16 bytes a parameter, 18 with parameters, times
    ``additional_buffer_factor`` 1.5).
    """
    ranks = settings.ranks_per_node
    shard = -(-parameters(model) // settings.num_gpus) * ranks
    layer_input = HALF * settings.tokens * model.hidden_size
    if settings.pinned_checkpoints:
        layer_input = 1 << (layer_input - 1).bit_length()
    states = {
        "parameters": HALF * shard if settings.offload_parameters else 0,
        "optimizer": settings.optimizer_bytes * shard if settings.offload_optimizer else 0,
        "gradients": FP32 * shard if settings.offload_optimizer else 0,
    }
    return {
        "checkpoints": ranks * model.num_layers * layer_input if settings.offload_checkpoints else 0,
        **states,
        "buffers": sum(states.values()) // 2,
    }


def limit_of(memory: NodeMemory, settings: DeepSpeedSettings, model: DenseDecoder, gpu: int, host: int) -> Limit | None:
    """What a run lacks on GPUs of ``gpu`` bytes in nodes of ``host`` bytes; None: nothing."""
    if settings.fused_kernels and not settings.wide_indices and settings.tokens * model.hidden_size >= INDEX_LIMIT:
        return "index"
    if memory.host_total > host:
        return "host"
    return "gpu" if memory.device > gpu else None


def solve_longest(model: DenseDecoder, settings: DeepSpeedSettings, gpu: int, host: int) -> Longest:
    """The longest sequence on GPUs of ``gpu`` bytes (``GPU_BYTES``) in nodes of ``host`` bytes.

    ``settings.sequence_length`` does not matter. Raises ConfigError where not even the shortest fits.
    """

    def attempt(steps: int) -> tuple[NodeMemory, Limit | None]:
        tried = replace(settings, sequence_length=steps * STEP * settings.sequence_parallel_size)
        memory = estimate_deepspeed(model, tried)
        return memory, limit_of(memory, tried, model, gpu, host)

    memory, limit = attempt(1)
    if limit is not None:
        raise ConfigError(
            f"deepspeed.num_gpus {settings.num_gpus}: not even {STEP} tokens a rank fit, for lack of {limit} memory "
            f"({memory.device / GIB:.1f} GiB on a GPU, {memory.host_total / GIB:.0f} GiB in a node)"
        )
    fits, fails, best = 1, 4, memory
    while (outcome := attempt(fails))[1] is None:
        fits, fails, best = fails, 4 * fails, outcome[0]
    limit = outcome[1]
    while fails - fits > max(1, fits // PRECISION):
        middle = (fits + fails) // 2
        memory, missing = attempt(middle)
        if missing is None:
            fits, best = middle, memory
        else:
            fails, limit = middle, missing
    assert limit is not None
    return Longest(fits * STEP * settings.sequence_parallel_size, limit, best)
