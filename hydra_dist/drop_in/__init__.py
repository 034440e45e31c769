"""Attention over many ranks for people who have their own trainer: modules, and an attention for transformers' models.

Thin modules with constructors of their own around ``hydra_dist.context`` and ``hydra_dist.model``; nothing is computed
here. ``ContextParallelAttention`` takes any strategy, ``RingAttention...`` is the same with the ring.
"""

from hydra_dist.drop_in.attention import (
    CCGQAAttention,
    ContextParallelAttention,
    ContextParallelAttentionBlock,
    ContextParallelAttentionConfig,
    create_context_parallel_attention,
)
from hydra_dist.drop_in.estimates import (
    Efficiency,
    MemoryUsage,
    estimate_context_parallel_efficiency,
    estimate_memory_usage,
)
from hydra_dist.drop_in.ring import (
    RingAttention,
    RingAttentionBlock,
    RingAttentionConfig,
    RingAttentionLayer,
    create_ring_attention,
)
from hydra_dist.drop_in.transformers_attention import attend_over_ranks, use_in_transformers
from hydra_dist.drop_in.validation import SetupReport, validate_ring_attention_setup

__all__ = [
    "CCGQAAttention",
    "ContextParallelAttention",
    "ContextParallelAttentionBlock",
    "ContextParallelAttentionConfig",
    "Efficiency",
    "MemoryUsage",
    "RingAttention",
    "RingAttentionBlock",
    "RingAttentionConfig",
    "RingAttentionLayer",
    "SetupReport",
    "attend_over_ranks",
    "create_context_parallel_attention",
    "create_ring_attention",
    "estimate_context_parallel_efficiency",
    "estimate_memory_usage",
    "use_in_transformers",
    "validate_ring_attention_setup",
]
