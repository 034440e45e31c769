"""How one tensor of ours and the tensors that others keep in its place are made from each other.

A layout is a list of rules. Each names one tensor of ours, the tensors on the other side with their shapes, and the two
directions between them. But for the temperature, both only cut, join and reorder: there and back gives every bit again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hydra_dist.errors import RunError

Shape = tuple[int, ...]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Named(NamedTuple):
    """A tensor by its name, and the shape that it must have."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Rule:
    """``ours`` is made of ``theirs`` by ``join``, and taken apart into them by ``split``."""

    ours: Named
    theirs: tuple[Named, ...]
    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]


def same(ours: str, theirs: str, *shape: int) -> Rule:
    """The same tensor under another name."""
    return reshaped(ours, shape, theirs, shape)


def reshaped(ours: str, shape: Shape, theirs: str, their_shape: Shape) -> Rule:
    """The same elements in the same order."""
    return Rule(
        Named(ours, shape),
        (Named(theirs, their_shape),),
        lambda parts: parts[0].reshape(shape),
        lambda tensor: [tensor.reshape(their_shape)],
    )


def stacked(ours: str, parts: Sequence[tuple[str, int]], columns: int) -> Rule:
    """Matrices (name, rows) with as many columns, one below the other."""
    rows = [count for _, count in parts]
    return Rule(
        Named(ours, (sum(rows), columns)),
        tuple(Named(name, (count, columns)) for name, count in parts),
        lambda tensors: torch.cat(list(tensors)),
        lambda tensor: tensor.split(rows),
    )


def grouped_taps(ours: str, theirs: str, num_heads: int, head_dim: int, kernel_size: int) -> Rule:
    """A convolution within heads: [heads, taps x D in, D out] here, Conv1d's [heads x D out, D in, taps] there."""

    def join(parts: Sequence[Tensor]) -> Tensor:
        by_head = parts[0].unflatten(0, (num_heads, head_dim))
        return by_head.permute(0, 3, 2, 1).flatten(1, 2)

    def split(tensor: Tensor) -> list[Tensor]:
        by_tap = tensor.unflatten(1, (kernel_size, head_dim))
        return [by_tap.permute(0, 3, 2, 1).flatten(0, 1)]

    shape = (num_heads, kernel_size * head_dim, head_dim)
    return Rule(Named(ours, shape), (Named(theirs, (num_heads * head_dim, head_dim, kernel_size)),), join, split)


def to_theirs(rules: Iterable[Rule], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors, by name, of our ``weights``; what no rule names is not looked at.

    Raises RunError for a weight that is missing or has another shape than the rule says.
    """
    tensors: dict[str, Tensor] = {}
    for rule in rules:
        tensor = _take(rule.ours, weights)
        tensors |= {named.name: part for named, part in zip(rule.theirs, rule.split(tensor), strict=True)}
    return tensors


def to_ours(rules: Iterable[Rule], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights, by name, of their ``tensors``; otherwise as ``to_theirs``."""
    return {rule.ours.name: rule.join([_take(named, tensors) for named in rule.theirs]) for rule in rules}


def _take(named: Named, tensors: Mapping[str, Tensor]) -> Tensor:
    if named.name not in tensors:
        raise RunError(f"{named.name} {list(named.shape)} is missing")
    tensor = tensors[named.name]
    if tuple(tensor.shape) != named.shape:
        raise RunError(f"{named.name} is {list(tensor.shape)}, and the configuration asks for {list(named.shape)}")
    if tensor.dtype not in DTYPES:
        raise RunError(f"{named.name} is {tensor.dtype}: quantized weights are not read; float32 and bfloat16 work")
    return tensor
