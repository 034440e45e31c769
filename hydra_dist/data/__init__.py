"""Tokenizing, packing, and a sampler that depends only on (seed, step).

``prepare`` turns documents into memory-mapped shards, ``Dataset`` opens one split of them, ``Sampler`` deals its
rows. The names that need torch are imported when they are first used.
"""

from typing import TYPE_CHECKING, Any

from hydra_dist.data.command import prepare_command
from hydra_dist.data.manifest import Manifest
from hydra_dist.data.prepare import Prepared, prepare
from hydra_dist.data.shards import Dataset, check_vocabulary
from hydra_dist.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from hydra_dist.data.batch import Batch
    from hydra_dist.data.sampler import Sampler

__all__ = [
    "Batch",
    "Dataset",
    "Manifest",
    "Prepared",
    "Sampler",
    "Tokenizer",
    "byte_tokenizer",
    "check_vocabulary",
    "load_tokenizer",
    "prepare",
    "prepare_command",
    "train_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name == "Batch":
        from hydra_dist.data.batch import Batch

        return Batch
    if name == "Sampler":
        from hydra_dist.data.sampler import Sampler

        return Sampler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
