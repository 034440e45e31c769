"""How much memory Megatron-LM takes to train a dense decoder-only model: closed forms, by pipeline stage and phase.

Allocated bytes of one rank: what stands all through training (parameters, gradients, optimizer, workspaces), and on top
of it the phase of a step that needs the most. The terms are read off what the code allocates; none is fitted.

Source: Megatron-LM at d98e8a64 (schedules.py, param_and_grad_buffer.py, distrib_optimizer.py, cross_entropy.py,
layers.py) and Transformer Engine at d0067d0d; measurements are in ``cases``.
"""

from hydra_dist.errors import ConfigError
from hydra_dist.memory.megatron_layer import BIT, EIGHT_BIT, HALF, WIDE, input_bytes, layer_bytes, mlp_bytes
from hydra_dist.memory.megatron_settings import OVERLAP_STREAMS, WORKSPACES, MegatronSettings
from hydra_dist.memory.result import BETWEEN_STEPS, Phase, RankMemory
from hydra_dist.memory.shapes import DenseDecoder

TOKEN = 8
"""A token id, label or position."""
LOGIT_BYTES = {"plain": HALF + WIDE, "fused": HALF + 2 * WIDE, "te": HALF + WIDE, "copied": HALF + 2 * WIDE}
"""An element of the logits at the loss: as the head leaves it, and in fp32 the softmax or gradient and its copies."""
LOSS = "loss"
HANDLES = 2
"""cuBLAS handles of torch, each with a workspace: forward and autograd run in two threads."""


def estimate_megatron(model: DenseDecoder, settings: MegatronSettings, stage: int = -1) -> RankMemory:
    """Allocated memory of one rank of pipeline stage ``stage`` (negative: from the end). Raises ConfigError."""
    check(model, settings)
    stages = settings.pipeline_parallel_size
    stage %= stages
    phases = [_between_steps(model, settings, stage), _backward(model, settings, stage)]
    if stage == stages - 1:
        phases += [_loss(model, settings), _head(model, settings)]
    kept, late = _kept(model, settings, stage), sum(settings.moment_bytes) * _sharded(model, settings, stage)
    if stages == settings.num_micro_batches == 1 and max(phases, key=lambda phase: phase.total).name == LOSS:
        late += _cublas_workspace(settings)  # autograd's thread multiplies for the first time after the loss
    return RankMemory(kept=kept, phases=tuple(phases), late=late)


def estimate_stages(model: DenseDecoder, settings: MegatronSettings) -> tuple[RankMemory, ...]:
    """``estimate_megatron`` of every pipeline stage."""
    return tuple(estimate_megatron(model, settings, stage) for stage in range(settings.pipeline_parallel_size))


def check(model: DenseDecoder, settings: MegatronSettings) -> None:
    """Refuse a model that these settings cannot split."""
    split = settings.tensor_parallel_size
    if model.num_query_heads % split:
        raise ConfigError(
            f"megatron.tensor_parallel_size {split} does not divide model.num_query_heads {model.num_query_heads}; "
            "tensor_parallel_size 1 works"
        )
    if model.num_key_heads % split and split % model.num_key_heads:
        raise ConfigError(
            f"megatron.tensor_parallel_size {split} neither divides nor is a multiple of model.num_key_heads "
            f"{model.num_key_heads}; tensor_parallel_size 1 works"
        )
    settings.chunk_layers(model)


def stage_parameters(model: DenseDecoder, settings: MegatronSettings, stage: int) -> int:
    """Parameters that one rank of a pipeline stage holds; a tied embedding stands on the first and the last stage."""
    split, width = settings.tensor_parallel_size, model.hidden_size
    vocab = settings.padded_vocab(model) // split * width
    total = settings.stage_layers(model, stage) * sum(layer_parameters(model, split))
    first, last = stage == 0, stage == settings.pipeline_parallel_size - 1
    if first:
        total += vocab + (model.max_positions * width if model.positions == "learned" else 0)
    if last:
        total += model.norm_parameters + (0 if model.tie_embeddings and first else vocab)
    return total


def layer_matrices(model: DenseDecoder, split: int) -> tuple[int, int, int, int]:
    """Elements of a layer's four matrices on one of ``split`` ranks: to q, k and v; back; into the MLP; out of it."""
    width, query, key = model.hidden_size, model.query_size // split, max(model.key_size // split, model.head_dim)
    return (
        width * (query + 2 * key),
        width * query,
        width * model.mlp_inputs // split,
        width * model.ffn_size // split,
    )


def layer_parameters(model: DenseDecoder, split: int) -> tuple[int, int]:
    """Of one layer on one of ``split`` tensor-parallel ranks: of its matrices, and of biases and norms."""
    width, matrices = model.hidden_size, layer_matrices(model, split)
    biases = (matrices[0] // width if model.has_qkv_bias else 0) + (
        2 * width + matrices[2] // width if model.linear_bias else 0
    )
    return sum(matrices), biases + 2 * model.norm_parameters + model.qk_norm_parameters


def _sharded(model: DenseDecoder, settings: MegatronSettings, stage: int) -> int:
    """Parameters whose optimizer state one rank holds."""
    return stage_parameters(model, settings, stage) // settings.optimizer_shards


def _kept(model: DenseDecoder, settings: MegatronSettings, stage: int) -> dict[str, int]:
    count, shard = stage_parameters(model, settings, stage), _sharded(model, settings, stage)
    gradient = WIDE if settings.precision == "bf16" else HALF
    return {
        "parameters": HALF * count + _eight_bit_parameters(model, settings, stage),
        "gradients": (gradient if settings.gradient_bytes is None else settings.gradient_bytes) * count,
        "optimizer": (settings.main_parameter_bytes + sum(settings.moment_bytes)) * shard,
        "workspaces": _workspaces(settings),
        "buffers": _buffers(model, settings, stage),
    }


def _eight_bit_parameters(model: DenseDecoder, settings: MegatronSettings, stage: int) -> int:
    """What 8 bits add to the parameters in 16: copies of the matrices, which may replace them.

    Hopper multiplies 8 bits only along the rows of both factors, so that forward and backward want a copy each.
    """
    if not settings.fp8:
        return 0
    matrices = settings.stage_layers(model, stage) * layer_parameters(model, settings.tensor_parallel_size)[0]
    copies = EIGHT_BIT * (2 if settings.gpu_kind == "H100" else 1)
    return matrices * (copies - (HALF if settings.fp8_parameters else 0))


def _workspaces(settings: MegatronSettings) -> int:
    engine = WORKSPACES[settings.gpu_kind][0] if settings.transformer_engine else 0
    overlapped = OVERLAP_STREAMS if settings.tensor_parallel_overlap else 0
    return HANDLES * _cublas_workspace(settings) + engine * (1 + overlapped)


def _cublas_workspace(settings: MegatronSettings) -> int:
    """Of one handle."""
    default = WORKSPACES[settings.gpu_kind][1]
    return default if settings.cublas_workspace is None else settings.cublas_workspace


def _buffers(model: DenseDecoder, settings: MegatronSettings, stage: int) -> int:
    """What is allocated once and stays.

    Scores of Megatron's own attention; the head's input, gathered over tensor-parallel ranks; and, where products add
    to the gradients themselves, the empty gradients that autograd gets, one for each shape of a matrix.
    """
    split, last = settings.tensor_parallel_size, stage == settings.pipeline_parallel_size - 1
    total = 0
    if settings.attention == "local":
        total += HALF * settings.tokens * model.num_query_heads // split * settings.sequence_length
    if last and settings.sequence_parallel and split > 1:
        total += HALF * settings.tokens * model.hidden_size
    if settings.gradient_accumulation_fusion and settings.transformer_engine:
        total += HALF * sum(layer_matrices(model, split))
        if last:
            total += HALF * settings.padded_vocab(model) // split * model.hidden_size
    return total


def passes_in_flight(settings: MegatronSettings, stage: int) -> tuple[int, ...]:
    """Forward passes of each model chunk of a stage that wait for their backward when the most do.

    Source: Megatron-LM's ``get_pp_rank_microbatches`` and ``get_schedule_table``.
    """
    stages, chunks = settings.pipeline_parallel_size, settings.num_model_chunks
    if stages == 1:
        return (1,) * chunks
    if chunks == 1:
        return (min(stages - stage, settings.num_micro_batches),)
    group = settings.micro_batch_group_size or stages
    passes = min(2 * (stages - stage - 1) + (chunks - 1) * group + 1, chunks * settings.num_micro_batches)
    order = [index // group % chunks for index in range(passes)]
    return tuple(order.count(chunk) for chunk in range(chunks))


def _activations(model: DenseDecoder, settings: MegatronSettings, stage: int) -> dict[str, int]:
    """All that waits for its backward when a stage holds the most."""
    in_flight, layers = passes_in_flight(settings, stage), settings.chunk_layers(model)[stage]
    parts = dict.fromkeys(("checkpoints", "norms", "attention", "mlp", "dropout", "embedding"), 0)
    for passes, count in zip(in_flight, layers, strict=True):
        again, inputs = recomputed_layers(settings, count)
        parts["checkpoints"] += passes * inputs * input_bytes(model, settings)
        for name, size in layer_bytes(model, settings).items():
            parts[name] += passes * (count - again) * size
    if stage == 0 and settings.hidden_dropout:
        parts["embedding"] = in_flight[0] * BIT * settings.residual_tokens * model.hidden_size
    return {name: size for name, size in parts.items() if size}


def recomputed_layers(settings: MegatronSettings, layers: int) -> tuple[int, int]:
    """How many of a chunk's layers are computed again in backward, and how many of their inputs are kept for it."""
    if settings.recompute != "full":
        return 0, 0
    if settings.recompute_method == "block":
        again = min(settings.recompute_num_layers, layers)
        return again, again
    return layers, -(-layers // settings.recompute_num_layers)


def _batch(settings: MegatronSettings) -> int:
    return settings.tokens * (3 * TOKEN + WIDE) + _mask(settings)


def _mask(settings: MegatronSettings) -> int:
    return settings.tokens * settings.sequence_length * BIT if settings.attention_mask else 0


def _pipeline(model: DenseDecoder, settings: MegatronSettings) -> int:
    """An input and its gradient, which a stage exchanges with its neighbour, and the last micro-batch's mask."""
    if settings.pipeline_parallel_size == 1:
        return 0
    return 2 * input_bytes(model, settings) + _mask(settings)


def _between_steps(model: DenseDecoder, settings: MegatronSettings, stage: int) -> Phase:
    """What a step leaves behind until the next one starts.

    Under interleaving the schedule leaves an input and its gradient of each chunk; the masks are gone with the chunks'
    data iterators. fp16 gradients are widened for the optimizer, and stay until the next step clears them.
    """
    pipeline = _pipeline(model, settings)
    if settings.num_model_chunks > 1 and pipeline:
        pipeline = 2 * settings.num_model_chunks * input_bytes(model, settings)
    widened = WIDE * _sharded(model, settings, stage) if settings.precision == "fp16" else 0
    return Phase(BETWEEN_STEPS, {"pipeline": pipeline, "widened gradients": widened})


def _loss(model: DenseDecoder, settings: MegatronSettings) -> Phase:
    """The logits meet their cross entropy: in 16 bits and, widened, in fp32."""
    vocab = settings.padded_vocab(model) // settings.tensor_parallel_size
    element = LOGIT_BYTES[settings.cross_entropy]
    parts = {
        **_activations(model, settings, settings.pipeline_parallel_size - 1),
        "final norm": 2 * input_bytes(model, settings),
        "logits": element * settings.tokens * vocab,
        "batch": _batch(settings),
        "pipeline": _pipeline(model, settings),
    }
    if settings.deferred_head_gradients is not None:
        waiting = min(settings.deferred_head_gradients or settings.num_micro_batches, settings.num_micro_batches)
        inputs = settings.num_micro_batches * input_bytes(model, settings)
        parts["deferred head"] = waiting * HALF * settings.tokens * vocab + inputs
    return Phase(LOSS, parts)


def _head(model: DenseDecoder, settings: MegatronSettings) -> Phase:
    """The head's backward: gradients of the logits, of what the head read, and of its weight if not added in place."""
    vocab = settings.padded_vocab(model) // settings.tensor_parallel_size
    weight = 0 if settings.gradient_accumulation_fusion else HALF * vocab * model.hidden_size
    hidden = HALF * settings.tokens * model.hidden_size
    return Phase(
        "head",
        {
            **_activations(model, settings, settings.pipeline_parallel_size - 1),
            "final norm": 2 * input_bytes(model, settings),
            "gradients of the head": HALF * settings.tokens * vocab + hidden + weight,
            "batch": _batch(settings),
            "pipeline": _pipeline(model, settings),
        },
    )


def _backward(model: DenseDecoder, settings: MegatronSettings, stage: int) -> Phase:
    """A layer's backward, all that waits being there, and what is computed again for it."""
    parts = _activations(model, settings, stage)
    again = min(recomputed_layers(settings, max(settings.chunk_layers(model)[stage]))[0], settings.recompute_num_layers)
    if settings.recompute_method == "block":
        again = min(again, 1)
    if again:  # the input of the first is the checkpoint
        parts["recomputed"] = again * sum(layer_bytes(model, settings).values()) - input_bytes(model, settings)
    parts["gradients of a layer"] = input_bytes(model, settings) + _gradients_inside(model, settings)
    if settings.context_parallel_size > 1:
        # Transformer Engine's ring keeps the keys and values of every rank until a layer's attention is done.
        keys = max(model.key_size // settings.tensor_parallel_size, model.head_dim)
        parts["ring"] = HALF * 2 * keys * settings.micro_batch_size * settings.sequence_length
    parts["batch"] = _batch(settings)
    parts["pipeline"] = _pipeline(model, settings)
    return Phase("backward", parts)


def _gradients_inside(model: DenseDecoder, settings: MegatronSettings) -> int:
    """Gradients inside a layer when it has the most of them, less what the layer has let go of by then.

    That is at the MLP's second product (its input's gradient and its weight's), at the activation (the gradients of
    both its sides, its result being gone), or at scores that are kept (their gradient, the MLP being gone).
    """
    split = settings.tensor_parallel_size
    down = 0 if settings.gradient_accumulation_fusion else HALF * layer_matrices(model, split)[3]
    product = HALF * settings.tokens * model.ffn_size // split + down
    activation = HALF * settings.tokens * model.mlp_inputs // split
    scores = 0
    if settings.attention in ("unfused", "local"):
        rows = settings.tokens * model.num_query_heads // split
        scores = HALF * rows * settings.sequence_length - mlp_bytes(model, settings)
    return max(product, activation, scores)
