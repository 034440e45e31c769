"""Attention over ranks inside the models of Hugging Face transformers.

    use_in_transformers(model)
    model(input_ids=seq.shard(tokens, 1), position_ids=seq.positions[None], sequence_plan=seq, use_cache=False)

The model computes on local rows. Its positions come from the plan, and the plan goes with the call down to the
attention of every layer. Positions are those of the whole sequence, in packed documents too: rotary embeddings see
differences only. (``seq.ages``, which start anew in every document, give the same numbers up to rounding.)

A loss that the model computes itself needs ``labels=`` and ``shift_labels=``, both the local rows of targets that were
shifted before they were dealt, and ``num_items_in_batch=``, the number of targets of all ranks: losses and gradients
then add up over ranks.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from hydra_dist.context import SequencePlan
from hydra_dist.errors import ConfigError

NAME = "hydra_dist"
"""Of the attention implementation."""
LAYERS = ("full_attention", "sliding_attention")
"""Kinds of layers that look at other rows in attention only, and there at those that a plan or a window leaves."""
_BY_LONGEST = ("dynamic", "longrope")
_NOT_OURS = ("softcap", "s_aux", "position_bias", "head_mask", "cu_seq_lens_q", "cu_seq_lens_k")


def use_in_transformers(model: nn.Module) -> None:
    """Make ``attend_over_ranks`` the attention of a ``transformers.PreTrainedModel``.

    Raises:
        ConfigError: a model whose attention cannot be exchanged, with layers that look across rows in another way, or
            with positions that depend on how long the local sequence is.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"{name} is not a transformers.PreTrainedModel; one, such as LlamaForCausalLM, works")
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv1d) and module.kernel_size != (1,):
            raise ConfigError(f"{name}: {path} is a convolution over rows that ranks hold; a model of attention works")
    for key, value in _settings(model.config.to_dict()):
        if key == "layer_types" and not set(value) <= set(LAYERS):
            others = ", ".join(sorted(set(value) - set(LAYERS)))
            raise ConfigError(f"{name}: {others} layers look across rows that ranks hold; {' and '.join(LAYERS)} work")
        if key == "rope_type" and value in _BY_LONGEST:
            raise ConfigError(
                f"{name}: rope_type {value} depends on the longest position that a rank holds; yarn works"
            )
    AttentionInterface.register(NAME, attend_over_ranks)
    AttentionMaskInterface.register(NAME, _no_mask)
    model.set_attn_implementation(NAME)  # which only warns where it changes nothing
    if model.config._attn_implementation != NAME:
        raise ConfigError(f"{name}: its attention cannot be exchanged; a model that uses AttentionInterface works")


def attend_over_ranks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    sequence_plan: SequencePlan | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer.

    Args:
        query: [B, Hq, S_local, D]; key, value: [B, Hk, S_local, D].
        attention_mask: must be None: the plan knows the mask.
        sliding_window: tokens that a row sees, itself included.
        is_causal: None: as the module says.

    Returns:
        [B, S_local, Hq, D], and no weights.

    Raises:
        ConfigError: no plan in the call, a mask, dropout, or anything else that changes attention.
    """
    if sequence_plan is None:
        raise ConfigError("the model was called without sequence_plan=; what ContextParallel.plan() returns works")
    if attention_mask is not None:
        raise ConfigError(_MASK)
    if dropout:
        raise ConfigError(f"attention dropout {dropout} does not exist over ranks; attention_dropout=0.0 works")
    for name in _NOT_OURS:
        if others.get(name) is not None:
            raise ConfigError(f"{name} does not exist in attention over ranks; a model or a call without it works")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return sequence_plan.attention(q, k, v, causal=causal, window=sliding_window, scale=scaling), None


_MASK = "attention_mask cannot be followed over ranks; documents in the plan, and no mask, work"


def _no_mask(*, attention_mask: Tensor | None = None, use_vmap: bool = False, **others: Any) -> None:
    """In the place of a mask over local rows. ``use_vmap``: the model brings a rule of its own for who sees whom."""
    if attention_mask is not None:
        raise ConfigError(_MASK)
    if use_vmap:
        raise ConfigError("the model changes the causal mask by a rule of its own, which ranks do not know")


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values of a configuration and of those inside it."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from _settings(value)
