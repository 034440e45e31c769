"""Bytes that autograd keeps between a forward and its backward, each storage once.

A saved view keeps the whole storage that it looks at, and one storage saved by several operators is kept once, so what
counts are the bytes of distinct storages. What would be there anyway (parameters, a layer's input, tables that all
layers share) is told and left out.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(function: Callable[[], object], left_out: Iterable[Tensor]) -> int:
    """Bytes kept for backward by what ``function`` computes, but for the storages of the tensors ``left_out``."""
    resident = {_key(tensor) for tensor in left_out}
    kept: dict[tuple[torch.device, int], Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Holding the tensor holds its storage, so that no later one can take its address.
        if _key(tensor) not in resident:
            kept[_key(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return total


def _key(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()
