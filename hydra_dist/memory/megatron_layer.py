"""Bytes that one Megatron-LM transformer layer keeps between its forward and its backward.

Read off what each operation of a layer saves: a norm its input, a product its input, attention q, k, v and its result,
a dropout its mask. Bytes are for one micro-batch on one rank. Sequence parallelism splits what stands between the
tensor-parallel regions (norms, residual stream, dropout); tensor parallelism splits what is inside them.

Source: Megatron-LM's transformer_layer.py, attention.py, mlp.py and fusions/, Transformer Engine's LayerNormLinear,
Linear and DotProductAttention; Korthikanti et al. 2022 (arXiv 2205.05198), section 4, for the older form of the list.
"""

from hydra_dist.memory.megatron_settings import MegatronSettings, Module
from hydra_dist.memory.shapes import DenseDecoder

HALF = 2
"""bf16 and fp16."""
EIGHT_BIT = 1
"""What a product in 8 bits keeps of its input."""
WIDE = 4
"""fp32: row statistics, lse."""
BIT = 1
"""Dropout and attention masks: a byte an element."""


def layer_bytes(model: DenseDecoder, settings: MegatronSettings) -> dict[str, int]:
    """By component. With ``recompute: full`` this is what one layer that is recomputed holds for a while."""
    return {
        "norms": norm_bytes(model, settings),
        "attention": attention_bytes(model, settings),
        "mlp": mlp_bytes(model, settings),
        "dropout": dropout_bytes(model, settings),
    }


def input_bytes(model: DenseDecoder, settings: MegatronSettings) -> int:
    """The residual stream between two layers: all that a fully recomputed layer keeps."""
    return HALF * settings.residual_tokens * model.hidden_size


def norm_bytes(model: DenseDecoder, settings: MegatronSettings) -> int:
    """Two norms: the residual stream that goes in, what comes out (the next product's input), and row statistics."""
    statistics = WIDE * (2 if model.norm == "layernorm" else 1)
    out = EIGHT_BIT if settings.fp8 else HALF
    outs = 2
    if recomputes(settings, "layernorm"):
        outs = 0
    elif recomputes(settings, "mlp"):
        outs = 1
    return settings.residual_tokens * (model.hidden_size * (2 * HALF + outs * out) + 2 * statistics)


def attention_bytes(model: DenseDecoder, settings: MegatronSettings) -> int:
    """q, k, v, the result (which the output projection reads), and what the softmax leaves behind."""
    tokens, split = settings.tokens, settings.tensor_parallel_size
    query, key = model.query_size // split, max(model.key_size // split, model.head_dim)
    heads = model.num_query_heads // split
    result = HALF * tokens * query
    total = HALF * tokens * (query + 2 * key) + result
    if model.qk_norm:
        total += HALF * tokens * (query + key) + WIDE * 2 * tokens * (heads + max(model.num_key_heads // split, 1))
    if settings.fp8:
        total += EIGHT_BIT * tokens * query  # as the output projection reads it
    if recomputes(settings, "core_attn"):
        return total
    if settings.attention == "flash" and settings.micro_batch_size > 1:
        total += result  # flash-attn's layout is [B, S, ...], Megatron's [S, B, ...]: the result is copied
    if settings.attention in ("flash", "fused"):
        return total + WIDE * tokens * heads
    return total + score_bytes(model, settings)


def score_bytes(model: DenseDecoder, settings: MegatronSettings) -> int:
    """Attention that keeps its scores: the softmax and, under dropout, a mask and what is left of the softmax."""
    rows = settings.tokens * model.num_query_heads // settings.tensor_parallel_size
    softmax = HALF if settings.fused_softmax else WIDE
    dropped = BIT + HALF if settings.attention_dropout else 0
    return rows * settings.sequence_length * (softmax + dropped)


def mlp_bytes(model: DenseDecoder, settings: MegatronSettings) -> int:
    """What the activation reads and what it leaves, which the second product reads."""
    if recomputes(settings, "mlp"):
        return 0
    read = EIGHT_BIT if settings.fp8 else HALF
    between = 0 if settings.fused_activation or not model.gated_mlp else HALF * model.ffn_size
    width = HALF * model.mlp_inputs + between + read * model.ffn_size
    return settings.tokens * width // settings.tensor_parallel_size


def dropout_bytes(model: DenseDecoder, settings: MegatronSettings) -> int:
    """The masks of the two dropouts before the residual additions."""
    return 2 * BIT * settings.residual_tokens * model.hidden_size if settings.hidden_dropout else 0


def recomputes(settings: MegatronSettings, module: Module) -> bool:
    """Whether the inside of a part of the layer is computed again in backward, the rest being kept."""
    return settings.recompute == "selective" and module in settings.recompute_modules
