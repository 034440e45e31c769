"""What a checkpoint is made of: named tensors, their names on disk, and how they are dealt to the ranks."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

WEIGHT = "weight"
"""The key of a parameter's fp32 master weight; its other keys are the optimizer's names."""


class State(Protocol):
    """What is saved and loaded: ``EngineState``, or anything else that has tensors by parameter name."""

    stage: int
    names: list[str]
    step: int

    def shape(self, name: str) -> tuple[int, ...]: ...
    def keys(self, name: str) -> tuple[str, ...]: ...
    def dtype(self, name: str, key: str) -> torch.dtype: ...
    def read_tensor(self, name: str, key: str, wanted: bool = True) -> Tensor | None: ...
    def write_tensor(self, name: str, key: str, value: Tensor) -> None: ...
    def prepare_for_loading(self) -> None: ...


def stored_name(name: str, key: str) -> str:
    """Under which a tensor goes into its shard: weights as the model names them, states as ``parameter/state``."""
    return name if key == WEIGHT else f"{name}/{key}"


def deal(sizes: Mapping[str, int], num_ranks: int) -> list[list[str]]:
    """Names for each rank, so that the sums of sizes are about equal: largest first, to whoever has least."""
    dealt: list[list[str]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        rank = loads.index(min(loads))
        dealt[rank].append(name)
        loads[rank] += sizes[name]
    return dealt
