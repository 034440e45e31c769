"""How one sequence is spread over ranks, and what of it does not go together."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from hydra_dist.config.model import ModelConfig
from hydra_dist.config.types import Count, Section
from hydra_dist.costs.layout import smallest_sequence
from hydra_dist.costs.ulysses import can_share_heads

Bandwidth = Annotated[float, Field(gt=0)]


class ContextConfig(Section):
    """How one sequence is spread over ranks."""

    size: Count = 1
    """Ranks that share one sequence."""
    strategy: Literal["auto", "ring", "all_gather", "ulysses", "hybrid"] = "ring"
    """``ring``: keys and values go around. ``all_gather``: every rank is sent the keys and values that it needs.
    ``ulysses``: ranks exchange rows for heads. ``hybrid``: Ulysses within groups of ``ulysses_size``, a ring across.
    ``auto``: what should take the least time by the bytes it sends; the run says which, and why."""
    ulysses_size: Count | None = None
    """Ranks that exchange rows for heads; for ``hybrid``. None: what should take the least time."""
    inner_ring: Count | None = None
    """Ranks of the ring that share a node, for a ring of rings: keys visit a node before they go to the next."""
    layout: Literal["zigzag", "contiguous", "striped", "balanced"] = "zigzag"
    """Who holds which rows. ``zigzag``: an early and a late piece each, even work under a causal mask. ``contiguous``:
    one piece each; even work where every layer has a window. ``striped``: every n-th row, not for convolutions.
    ``balanced``: as many pieces as even work takes within the documents of a packed row."""
    ranks_per_node: Count = 8
    """For ``auto``, as are the next two."""
    intra_node_bandwidth: Bandwidth = 450.0
    """GB/s that a rank sends to others of its node."""
    inter_node_bandwidth: Bandwidth = 50.0
    """GB/s that a rank sends to other nodes."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """How long a rank waits for another before the run ends with an error."""


def check_context(context: ContextConfig, model: ModelConfig, sequence_length: int) -> None:
    """ValueError for settings that do not go together, with what works."""
    size = context.size
    pieces = smallest_sequence(context.layout, size)
    if sequence_length < pieces:
        raise ValueError(
            f"data.sequence_length {sequence_length} is shorter than the {pieces} pieces that context.size {size} with "
            f"layout {context.layout} cuts it into; data.sequence_length {pieces} or more works"
        )
    if context.ulysses_size is not None:
        _check_ulysses_size(context)
    shared = size if context.strategy == "ulysses" else context.ulysses_size or 1
    if not shares_heads(model, shared):
        works = [number for number in range(1, size + 1) if size % number == 0 and shares_heads(model, number)]
        heads = sorted({(layer.num_query_heads, layer.num_key_heads) for layer in model.layers})
        if context.strategy == "ulysses":
            key = "context.size"
            end = f"context.strategy=hybrid with context.ulysses_size={works[-1]}, or context.strategy=ring, works"
        else:
            key, end = "context.ulysses_size", f"context.ulysses_size={works[-1]} works"
        raise ValueError(
            f"{key} {shared}: layers of {_listed(heads)} query and key heads cannot be dealt to {shared} ranks; {end}"
        )
    if context.inner_ring is not None:
        _check_inner_ring(context)


def shares_heads(model: ModelConfig, num_ranks: int) -> bool:
    """Whether the heads of every layer can be dealt to as many ranks."""
    return all(can_share_heads(layer.num_query_heads, layer.num_key_heads, num_ranks) for layer in model.layers)


def _check_ulysses_size(context: ContextConfig) -> None:
    size, wanted = context.size, context.ulysses_size
    if context.strategy != "hybrid":
        raise ValueError(
            f"context.ulysses_size {wanted} is for context.strategy hybrid, and the strategy is {context.strategy}; "
            f"context.strategy=hybrid, or no ulysses_size, works"
        )
    if size % (wanted or 1):
        works = [number for number in range(1, size + 1) if size % number == 0]
        raise ValueError(
            f"context.ulysses_size {wanted} does not divide context.size {size}; {' or '.join(map(str, works))} works"
        )


def _check_inner_ring(context: ContextConfig) -> None:
    if context.strategy not in ("ring", "hybrid"):
        raise ValueError(
            f"context.inner_ring {context.inner_ring} is for the strategies ring and hybrid, and the strategy is "
            f"{context.strategy}; context.strategy=ring, or no inner_ring, works"
        )
    if context.strategy == "hybrid" and context.ulysses_size is None:
        raise ValueError(
            f"context.inner_ring {context.inner_ring} with strategy hybrid needs context.ulysses_size; "
            f"context.ulysses_size=1 works"
        )
    ranks = context.size // (context.ulysses_size or 1)
    if ranks % (context.inner_ring or 1):
        works = [number for number in range(1, ranks + 1) if ranks % number == 0]
        raise ValueError(
            f"context.inner_ring {context.inner_ring} does not divide the {ranks} ranks of the ring; "
            f"{' or '.join(map(str, works))} works"
        )


def _listed(pairs: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{queries} and {keys}" for queries, keys in pairs)
