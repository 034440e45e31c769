"""Megatron-LM's command-line options, read as a model's shape and a run's settings.

Options that do not touch memory are passed over; those that ask for what the closed forms do not cover are refused.
"""

from collections.abc import Mapping
from typing import Any

from hydra_dist.errors import ConfigError
from hydra_dist.memory.megatron_settings import ALIKE, MIB, Attention, MegatronSettings
from hydra_dist.memory.shapes import DenseDecoder, Positions

Arguments = Mapping[str, Any]

DETERMINISTIC_WORKSPACE = 32 * MIB
"""Of one cuBLAS handle under CUBLAS_WORKSPACE_CONFIG=:4096:8, which deterministic products ask for: bytes."""

MULTIPLE = "make-vocab-size-divisible-by"
ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
MODULES = ("core_attn", "layernorm", "mlp")
POSITIONS: dict[str, Positions] = {"learned_absolute": "learned", "rope": "rope", "none": "none"}
REQUIRED = (
    "num-layers",
    "hidden-size",
    "num-attention-heads",
    "vocab-size",
    "max-position-embeddings",
    "seq-length",
    "micro-batch-size",
)
"""Options without which nothing can be said; ``vocab-size``, or ``padded-vocab-size``, even where Megatron-LM would ask
the tokenizer."""
REFUSED = {
    "num-experts": "a mixture of experts",
    "multi-latent-attention": "multi-latent attention",
    "experimental-attention-variant": "an experimental attention",
    "hybrid-layer-pattern": "a hybrid of attention and state-space layers",
    "is-hybrid-model": "a hybrid of attention and state-space layers",
    "mtp-num-layers": "multi-token prediction",
    "use-megatron-fsdp": "fully sharded parameters",
    "use-custom-fsdp": "fully sharded parameters",
    "use-torch-fsdp2": "fully sharded parameters",
    "export-kd-cfg": "distillation, which holds a second model",
    "optimizer-cpu-offload": "an optimizer in host memory",
    "cpu-offloading-num-layers": "activations in host memory",
    "distribute-saved-activations": "checkpoints split over tensor-parallel ranks",
    "fp32-residual-connection": "a residual stream in fp32",
    "pipeline-model-parallel-layout": "pipeline stages laid out by hand",
    "spec": "layers of one's own",
}
"""What the closed forms do not cover, by the option that asks for it."""


def read_arguments(
    arguments: Arguments, gpus: int, gpu: str, **overrides: Any
) -> tuple[DenseDecoder, MegatronSettings]:
    """Shape and settings of ``pretrain_gpt.py`` with these options.

    Args:
        arguments: option names without leading dashes; a flag's value is True.
        gpus: the world size.
        gpu: kind of GPU, as in ``MegatronSettings.gpu``.
        overrides: settings that the options leave to the libraries, such as ``attention``.

    Raises ConfigError for an architecture or a way of running that the closed forms do not cover.
    """
    for option, meaning in REFUSED.items():
        if arguments.get(option):
            raise ConfigError(
                f"--{option} {arguments[option]}: the memory of {meaning} is not estimated for Megatron-LM; "
                f"dense decoder-only models without --{option} are"
            )
    for option in REQUIRED:
        if option not in arguments and not (option == "vocab-size" and "padded-vocab-size" in arguments):
            raise ConfigError(f"--{option} is missing; the memory of a run depends on it")
    if arguments.get("optimizer", "adam") != "adam":
        raise ConfigError(f"--optimizer {arguments['optimizer']} is not estimated for Megatron-LM; adam is")
    if not arguments.get("bf16") and not arguments.get("fp16"):
        raise ConfigError("parameters in fp32 are not estimated for Megatron-LM; --bf16 and --fp16 are")
    return _model(arguments), _settings(arguments, gpus, gpu, overrides)


def _model(arguments: Arguments) -> DenseDecoder:
    hidden, heads = int(arguments["hidden-size"]), int(arguments["num-attention-heads"])
    groups = int(arguments.get("num-query-groups", 1)) if arguments.get("group-query-attention") else heads
    gated = bool(arguments.get("swiglu"))
    default = int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden
    positions = arguments.get("position-embedding-type", "learned_absolute")
    if positions not in POSITIONS:
        raise ConfigError(f"--position-embedding-type {positions} is not estimated; {', '.join(POSITIONS)} are")
    bias = not arguments.get("disable-bias-linear")
    return DenseDecoder(
        num_layers=int(arguments["num-layers"]),
        hidden_size=hidden,
        ffn_size=int(arguments.get("ffn-hidden-size", default)),
        num_query_heads=heads,
        num_key_heads=groups,
        head_dim=int(arguments.get("kv-channels", hidden // heads)),
        vocab_size=int(arguments.get("padded-vocab-size") or arguments["vocab-size"]),
        max_positions=int(arguments["max-position-embeddings"]),
        tie_embeddings=not arguments.get("untie-embeddings-and-output-weights"),
        gated_mlp=gated,
        norm="rmsnorm" if arguments.get("normalization") == "RMSNorm" else "layernorm",
        positions=POSITIONS[positions],
        linear_bias=bias,
        qkv_bias=bias or bool(arguments.get("add-qkv-bias")),
        qk_norm=bool(arguments.get("qk-layernorm")),
    )


def _settings(arguments: Arguments, gpus: int, gpu: str, overrides: Mapping[str, Any]) -> MegatronSettings:
    tensor = int(arguments.get("tensor-model-parallel-size", 1))
    pipeline = int(arguments.get("pipeline-model-parallel-size", 1))
    context = int(arguments.get("context-parallel-size", 1))
    split = tensor * pipeline * context
    if gpus % split:
        raise ConfigError(
            f"{gpus} GPUs are not a multiple of tensor x pipeline x context parallelism {split}; {split} are"
        )
    data = gpus // split
    micro = int(arguments["micro-batch-size"])
    chunks = int(arguments.get("num-virtual-stages-per-pipeline-rank", 1))
    per_chunk = arguments.get("num-layers-per-virtual-pipeline-stage")
    if per_chunk:
        chunks = int(arguments["num-layers"]) // pipeline // int(per_chunk)
    group = arguments.get("microbatch-group-size-per-virtual-pipeline-stage")
    local = arguments.get("transformer-impl") == "local"
    fused = bool(arguments.get("cross-entropy-loss-fusion"))
    te_loss = arguments.get("cross-entropy-fusion-impl") == "te"
    granularity = "selective" if arguments.get("recompute-activations") else "none"
    deterministic = bool(arguments.get("deterministic-mode"))
    chosen: dict[str, Any] = {
        "sequence_length": int(arguments["seq-length"]),
        "micro_batch_size": micro,
        "num_micro_batches": max(int(arguments.get("global-batch-size", micro * data * 64)) // (micro * data), 1),
        "tensor_parallel_size": tensor,
        "pipeline_parallel_size": pipeline,
        "num_model_chunks": chunks,
        "micro_batch_group_size": int(group) if group else None,
        "first_stage_layers": arguments.get("decoder-first-pipeline-num-layers"),
        "last_stage_layers": arguments.get("decoder-last-pipeline-num-layers"),
        "embedding_counts_as_layer": bool(arguments.get("account-for-embedding-in-pipeline-split")),
        "loss_counts_as_layer": bool(arguments.get("account-for-loss-in-pipeline-split")),
        "context_parallel_size": context,
        "data_parallel_size": data,
        "sequence_parallel": bool(arguments.get("sequence-parallel")) and tensor > 1,
        "distributed_optimizer": bool(arguments.get("use-distributed-optimizer")),
        "num_optimizer_instances": int(arguments.get("num-distributed-optimizer-instances", 1)),
        "precision": "fp16" if arguments.get("fp16") else "bf16",
        "gradient_bytes": _gradient_bytes(arguments),
        "main_parameter_bytes": _bytes(arguments, "main-params-dtype"),
        "moment_bytes": (_bytes(arguments, "exp-avg-dtype"), _bytes(arguments, "exp-avg-sq-dtype")),
        "fp8": bool(arguments.get("fp8-format")),
        "fp8_parameters": bool(arguments.get("fp8-param-gather")),
        "recompute": arguments.get("recompute-granularity", granularity),
        "recompute_modules": _modules(arguments.get("recompute-modules", "core_attn")),
        "recompute_method": arguments.get("recompute-method", "uniform"),
        "recompute_num_layers": int(arguments.get("recompute-num-layers", 1)),
        "transformer_engine": not local,
        "attention": _attention(arguments, gpu, deterministic),
        "fused_softmax": not arguments.get("no-masked-softmax-fusion"),
        "tensor_parallel_overlap": bool(arguments.get("tp-comm-overlap")),
        "gradient_accumulation_fusion": not arguments.get("no-gradient-accumulation-fusion"),
        "deferred_head_gradients": int(arguments.get("wgrad-deferral-limit", 0))
        if arguments.get("defer-embedding-wgrad-compute")
        else None,
        "attention_dropout": float(arguments.get("attention-dropout", 0.1)),
        "hidden_dropout": float(arguments.get("hidden-dropout", 0.1)),
        "cross_entropy": ("te" if te_loss else "fused") if fused else "plain",
        "attention_mask": not arguments.get("no-create-attention-mask-in-dataloader"),
        "fused_activation": not (arguments.get("no-bias-swiglu-fusion") or arguments.get("no-bias-gelu-fusion")),
        "gpu": gpu,
        "vocab_multiple": 1 if arguments.get("padded-vocab-size") else int(arguments.get(MULTIPLE, 128)),
        "cublas_workspace": DETERMINISTIC_WORKSPACE if deterministic else None,
    }
    return MegatronSettings(**{**chosen, **overrides})


def _gradient_bytes(arguments: Arguments) -> int | None:
    if arguments.get("main-grads-dtype"):
        return _bytes(arguments, "main-grads-dtype")
    return 2 if arguments.get("grad-reduce-in-bf16") else None


def _bytes(arguments: Arguments, option: str) -> int:
    """Of an element of the type that an option names; fp32 where it is not given."""
    name = arguments.get(option, "fp32")
    if name not in ELEMENT_BYTES:
        raise ConfigError(f"--{option} {name} is not known; {', '.join(ELEMENT_BYTES)} are")
    return ELEMENT_BYTES[name]


def _modules(given: str | list[str]) -> tuple[str, ...]:
    """Of selective recomputation, as the option's words. Raises ConfigError for those of other architectures."""
    modules = tuple(given.split() if isinstance(given, str) else given)
    for module in modules:
        if module not in MODULES:
            raise ConfigError(f"--recompute-modules {module} is not estimated; {', '.join(MODULES)} are")
    return modules


def _attention(arguments: Arguments, gpu: str, deterministic: bool) -> Attention:
    """Who computes it. Transformer Engine's own choice is flash-attn on Ampere, otherwise cuDNN where that can."""
    backend = arguments.get("attention-backend", "auto")
    if arguments.get("transformer-impl") == "local":
        return "flash" if arguments.get("use-flash-attn") else "local"
    if backend in ("flash", "fused", "unfused"):
        return backend
    kind = ALIKE.get(gpu, gpu)
    return "flash" if kind == "A100" or (kind == "GB200" and deterministic) else "fused"
