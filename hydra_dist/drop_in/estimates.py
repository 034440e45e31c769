"""What attention over ranks costs, before there are ranks: bytes sent, balance, memory."""

from dataclasses import dataclass

from hydra_dist.context.parallel import STRATEGIES
from hydra_dist.costs.gather import gather_traffic
from hydra_dist.costs.halo import halo_traffic, has_halo
from hydra_dist.costs.layout import Documents, chunks, cut, lengths
from hydra_dist.costs.needs import MaskRule
from hydra_dist.costs.rotation import Heads, cheaper_backward, ring_traffic, travelling_bytes
from hydra_dist.costs.tiles import Span, needed_pairs, tiles
from hydra_dist.costs.traffic import RankTraffic, accumulator_bytes
from hydra_dist.costs.ulysses import key_heads_per_rank, ulysses_traffic
from hydra_dist.drop_in.attention import ContextParallelAttentionConfig
from hydra_dist.errors import ConfigError, nearest


@dataclass(frozen=True)
class Efficiency:
    """Of one attention layer over ranks.

    Attributes:
        traffic: bytes and messages of every rank, forward and backward; what ``SequencePlan.stats`` counts.
        pairs: (query, key) pairs that the mask leaves each rank, for one head, over all batch rows.
        balance: the mean of ``pairs`` over their largest: the share of its time that a rank computes, where nothing
            else takes time.
    """

    traffic: tuple[RankTraffic, ...]
    pairs: tuple[int, ...]

    @property
    def balance(self) -> float:
        return sum(self.pairs) / (len(self.pairs) * max(self.pairs))


def estimate_context_parallel_efficiency(
    config: ContextParallelAttentionConfig,
    sequence_length: int,
    ranks: int | tuple[int, int],
    *,
    batch_size: int = 1,
    element_bytes: int = 2,
    documents: Documents | None = None,
) -> Efficiency:
    """Bytes, messages and balance of a layer's forward and backward pass.

    Args:
        sequence_length: rows of the whole sequence.
        ranks: P, or (ring, ulysses); P means (1, P) for the strategy ``ulysses`` and (P, 1) for others.
        element_bytes: of an activation: 2 for bf16, 4 for fp32.
        documents: for each batch row the sorted start positions of its documents, or one entry for all rows; None: one
            document.

    Raises:
        ConfigError: settings that do not go together, as a layer would say.
        ValueError: documents of another number of rows.
    """
    if documents is not None and len(documents) not in (1, batch_size):
        raise ValueError(f"documents of {len(documents)} rows, and batch_size is {batch_size}")
    layer = config.layer()
    ring, ulysses = _grid(config, ranks)
    shared = key_heads_per_rank(layer.num_query_heads, layer.num_key_heads, ulysses)
    heads = Heads(layer.num_query_heads, layer.num_key_heads, layer.head_dim)
    on_ring = Heads(layer.num_query_heads // ulysses, shared, layer.head_dim)
    dealing = chunks(config.layout, sequence_length, ring, documents)
    mask = MaskRule(True, layer.window, documents)
    if config.strategy == "all_gather":
        around = gather_traffic(dealing, mask, on_ring, batch_size=batch_size, element_bytes=element_bytes)
    else:
        around = ring_traffic(
            dealing, mask, on_ring, batch_size=batch_size, element_bytes=element_bytes, inner=config.inner_ring
        )
    parts = [(layer.halo_rows, (layer.query_size + layer.key_size) * element_bytes)] if layer.halo_rows else []
    if layer.attention == "ccgqa" and layer.use_value_shift:
        parts.append((1, (layer.key_size - layer.key_size // 2) * element_bytes))
    all_ranks = [part for held in dealing for part in cut(held, ulysses)]
    if parts and not all(map(has_halo, all_ranks)):
        raise ConfigError(
            f"layout {config.layout}: convolutions and the value shift read rows that other ranks hold; zigzag works"
        )
    halo = halo_traffic(all_ranks, parts, batch_size=batch_size)
    traffic, pairs = [], []
    for rank, held in enumerate(dealing):
        rows = lengths(all_ranks)[rank * ulysses : (rank + 1) * ulysses]
        exchanges = ulysses_traffic(rows, heads, batch_size=batch_size, element_bytes=element_bytes)
        for part, exchange in enumerate(exchanges):
            traffic.append(_sum(around[rank], exchange, halo[rank * ulysses + part]))
        found = tiles(_spans([held]), _spans(dealing), causal=True, window=layer.window, documents=documents)
        pairs += [needed_pairs(found, batch_size)] * ulysses
    return Efficiency(tuple(traffic), tuple(pairs))


@dataclass(frozen=True)
class MemoryUsage:
    """Bytes that ring attention holds on one rank, the one with the most rows; projections are not in it.

    Attributes:
        saved: q, k, v, out and lse, from the forward pass to the backward pass.
        forward: at most at a time in the forward pass: q, k, v, the running result, a part that is merged into it (in
            its dtype too), this rank's keys on their way, and up to two visitors.
        backward: at most at a time in the backward pass: ``saved``, the output's gradient, gradients and a part that is
            added to them, this rank's rows on their way, up to two visitors, and up to three sums that follow them.
    """

    saved: int
    forward: int
    backward: int


def estimate_memory_usage(
    config: ContextParallelAttentionConfig,
    sequence_length: int,
    ranks: int,
    *,
    batch_size: int = 1,
    element_bytes: int = 2,
) -> MemoryUsage:
    """What ring attention of one layer holds on a rank, by closed form, where all keys go all the way around.

    It takes the attention kernel to allocate its results, in the dtype of its inputs. (The CPU's works on fp32 copies
    of bf16 tensors, which are not in it.)

    Args:
        sequence_length: rows of the whole sequence.
        ranks: of the ring.
        element_bytes: of an activation: 2 for bf16, 4 for fp32.

    Raises:
        ConfigError: a strategy other than the ring.
    """
    if config.strategy != "ring":
        raise ConfigError(f"strategy {config.strategy}: memory is estimated for ring")
    layer = config.layer()
    rows = batch_size * max(lengths(chunks(config.layout, sequence_length, ranks)))
    wide = accumulator_bytes(element_bytes)
    heads = Heads(layer.num_query_heads, layer.num_key_heads, layer.head_dim)
    queries, keys = rows * layer.query_size, rows * layer.key_size
    lse = rows * layer.num_query_heads * wide
    given = (queries + 2 * keys) * element_bytes
    out = queries * element_bytes
    travelling, sums = {1: (0, 0), 2: (2, 1)}.get(ranks, (3, 3))  # this rank's rows and the visitors; what follows them
    merged = queries * wide if ranks > 1 and element_bytes < wide else 0
    key_visit, _ = travelling_bytes("keys", heads, element_bytes)
    back_visit, back_sum = travelling_bytes(cheaper_backward(heads, element_bytes), heads, element_bytes)
    return MemoryUsage(
        saved=given + out + lse,
        forward=given + queries * wide + lse + out + lse + merged + travelling * rows * key_visit,
        backward=given
        + 2 * out
        + lse
        + (queries + 2 * keys) * wide
        + given
        + rows * (travelling * back_visit + sums * back_sum),
    )


def _grid(config: ContextParallelAttentionConfig, ranks: int | tuple[int, int]) -> tuple[int, int]:
    """(ring, ulysses), of a strategy that can use it."""
    strategy = config.strategy
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy {strategy}{nearest(strategy, STRATEGIES)}; {', '.join(STRATEGIES)} exist")
    ring, ulysses = ranks if isinstance(ranks, tuple) else (1, ranks) if strategy == "ulysses" else (ranks, 1)
    if strategy != "hybrid" and (ring if strategy == "ulysses" else ulysses) > 1:
        works = (1, ring * ulysses) if strategy == "ulysses" else (ring * ulysses, 1)
        raise ConfigError(f"ranks {ranks} (ring, ulysses): strategy {strategy} cannot use them; {works} works")
    return ring, ulysses


def _spans(dealing: list[list[range]]) -> list[Span]:
    spans, row = [], 0
    for held in dealing:
        for chunk in held:
            spans.append(Span(row, row + len(chunk), chunk.start, chunk.step))
            row += len(chunk)
    return spans


def _sum(*parts: RankTraffic) -> RankTraffic:
    return RankTraffic(
        sum(part.forward_bytes for part in parts),
        sum(part.forward_messages for part in parts),
        sum(part.backward_bytes for part in parts),
        sum(part.backward_messages for part in parts),
    )
