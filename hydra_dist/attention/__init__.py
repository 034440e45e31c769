"""Softmax attention on one device: one entry point, a mask type, and one file per implementation.

``attention`` is what a model calls. ``attend_tiles`` and ``attend_tiles_backward`` are the same over some of the keys,
added to a running result, which is what a rank of a context-parallel group calls for each shard of keys.
"""

from hydra_dist.attention.backends import backends
from hydra_dist.attention.mask import Mask
from hydra_dist.attention.merge import LARGEST_LOGIT_BOUND, MergeRule, merge, merge_into, merge_rule
from hydra_dist.attention.operator import attention, explain
from hydra_dist.attention.partial import attend_tiles, attend_tiles_backward

__all__ = [
    "LARGEST_LOGIT_BOUND",
    "Mask",
    "MergeRule",
    "attend_tiles",
    "attend_tiles_backward",
    "attention",
    "backends",
    "explain",
    "merge",
    "merge_into",
    "merge_rule",
]
