"""What attention over ranks is said to cost, against what it does cost."""

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.tensor_memory import TensorMemory
from benchmarks.uncounted import uncounted
from hydra_dist.attention import flash, partial
from hydra_dist.attention.backends import Backend
from hydra_dist.context import run_ranks
from hydra_dist.costs.layout import Documents, chunks
from hydra_dist.drop_in import (
    ContextParallelAttention,
    ContextParallelAttentionConfig,
    RingAttention,
    RingAttentionConfig,
    estimate_context_parallel_efficiency,
    estimate_memory_usage,
)
from hydra_dist.errors import ConfigError

LENGTH = 203
PACKED = ((0, 9, 60, 61, 170), (0, 100))
GRIDS = [
    ("ring", "zigzag", (3, 1)),
    ("ring", "contiguous", (4, 1)),
    ("ring", "balanced", (2, 1)),
    ("all_gather", "zigzag", (3, 1)),
    ("all_gather", "balanced", (3, 1)),
    ("ulysses", "zigzag", (1, 4)),
    ("hybrid", "contiguous", (2, 2)),
    ("hybrid", "zigzag", (2, 4)),
    ("ring", "zigzag", (1, 1)),
]


def config(strategy="ring", layout="zigzag", **settings):
    return ContextParallelAttentionConfig(
        64, 8, num_key_heads=2, head_dim=8, strategy=strategy, layout=layout, **settings
    )


def starts_of(documents: Documents, length: int) -> torch.Tensor:
    starts = torch.zeros(len(documents), length, dtype=torch.int64)
    for row, positions in enumerate(documents):
        for position in positions:
            starts[row, position:] = position
    return starts


def counted(shape, ranks, documents):
    """Bytes and messages of every rank, forward and backward, of a real step in fp32."""
    starts = None if documents is None else starts_of(documents, LENGTH)

    def one_rank(mesh):
        layer = ContextParallelAttention(shape, mesh)
        seq = layer.plan(LENGTH, starts)
        layer(seq.shard(torch.randn(2, LENGTH, 64), 1).requires_grad_(), seq).sum().backward()
        stats = seq.stats()
        return tuple(stats[way][what] for way in ("forward", "backward") for what in ("bytes", "messages"))

    return run_ranks(ranks, one_rank, timeout=30)


def estimated(shape, ranks, documents, **other):
    found = estimate_context_parallel_efficiency(
        shape, LENGTH, ranks, **{"batch_size": 2, "element_bytes": 4, "documents": documents, **other}
    )
    return [
        (rank.forward_bytes, rank.forward_messages, rank.backward_bytes, rank.backward_messages)
        for rank in found.traffic
    ]


@pytest.mark.parametrize(
    ("attention", "window", "documents"),
    [("gqa", None, None), ("gqa", 40, PACKED), ("ccgqa", None, PACKED), ("ccgqa", 40, None)],
    ids=["gqa", "gqa, window and documents", "ccgqa, documents", "ccgqa, window"],
)
@pytest.mark.parametrize(("strategy", "layout", "ranks"), GRIDS)
def test_bytes_and_messages_are_those_of_a_step(strategy, layout, ranks, attention, window, documents):
    shape = config(strategy, layout, attention=attention, window=window)
    found = counted(shape, ranks, documents)
    assert estimated(shape, ranks, documents) == found
    assert (max(sent[0] for sent in found) > 0) == (ranks != (1, 1))


@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
def test_striped_rows_too(strategy):
    shape = config(strategy, "striped", window=40)
    assert estimated(shape, 3, PACKED) == counted(shape, 3, PACKED)


def test_a_ring_of_rings_too():
    shape = config(inner_ring=2)
    assert estimated(shape, 4, None) == counted(shape, (4, 1), None)


def test_the_comparison_tells_a_wrong_estimate():
    shape = config(attention="ccgqa")
    documents = ((0, 50, 100, 150),) * 2
    found = counted(shape, 3, documents)
    assert estimated(shape, 3, documents) == found
    assert estimated(shape, 3, None) != found
    assert estimated(shape, 3, documents, element_bytes=2) != found
    assert estimated(shape, 3, documents[:1], batch_size=1) != found
    assert estimated(config(attention="gqa"), 3, documents) != found


def allowed_pairs(held, documents, window):
    """Of one rank: (query, key) pairs by the mask's definition."""
    positions = torch.arange(LENGTH)
    total = 0
    for starts in starts_of(documents or ((0,), (0,)), LENGTH):
        mask = (positions[None] <= positions[:, None]) & (starts[None] == starts[:, None])
        if window is not None:
            mask &= positions[:, None] - positions[None] < window
        total += sum(int(mask[chunk.start : chunk.stop : chunk.step].sum()) for chunk in held)
    return total


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("documents", [None, PACKED], ids=["one document", "documents"])
@pytest.mark.parametrize(
    ("strategy", "layout", "ranks"), [*GRIDS, ("ring", "striped", (3, 1))], ids=lambda value: str(value)
)
def test_pairs_are_those_that_the_mask_allows(strategy, layout, ranks, documents, window):
    shape = config(strategy, layout, window=window)
    found = estimate_context_parallel_efficiency(shape, LENGTH, ranks, batch_size=2, documents=documents)
    dealing = chunks(layout, LENGTH, ranks[0], documents)
    pairs = [allowed_pairs(held, documents, window) for held in dealing for _ in range(ranks[1])]
    assert list(found.pairs) == pairs
    assert found.balance == pytest.approx(sum(pairs) / len(pairs) / max(pairs), rel=1e-12)


def test_contiguous_rows_are_worked_on_unevenly():
    even, uneven = (
        estimate_context_parallel_efficiency(config("ring", layout), 4096, 8).balance
        for layout in ("zigzag", "contiguous")
    )
    assert even > 0.999
    assert uneven == pytest.approx(8 * 8 / 2 / 8 / 7.5, rel=1e-3)  # the last rank has 7.5 of 32 pieces


def held(shape, length, ranks, batch_size, dtype):
    """Of the rank that holds most: what stays after forward, at most at a time in forward, and in backward."""
    layer = shape.layer()
    heads = layer.num_query_heads, layer.num_key_heads, layer.num_key_heads, layer.num_query_heads

    def one_rank(mesh):
        ring = RingAttention(uncounted(mesh), layout=shape.layout)
        seq = ring.plan(length)
        rows = seq.geometry.local_length
        q, k, v, grad = (torch.randn(batch_size, rows, count, layer.head_dim).to(dtype) for count in heads)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        with TensorMemory() as memory:
            out = ring(*inputs, seq)
            forward, saved = memory.peak_bytes, memory.alive_bytes
            memory.peak_bytes = 0
            out.backward(grad)
        given = sum(x.nbytes for x in inputs)
        return given + saved, given + forward, given + grad.nbytes + memory.peak_bytes

    return [max(numbers) for numbers in zip(*run_ranks(ranks, one_rank), strict=True)]


@pytest.fixture
def kernel_without_copies(monkeypatch):
    """In the place of the CPU's: one that allocates its results, in the inputs' dtype, and nothing else."""

    def only_results(operation):
        def run(*inputs):
            with _disable_current_modes():
                found = operation(*(x.float() if isinstance(x, torch.Tensor) else x for x in inputs))
            return tuple(x.to(inputs[0].dtype, copy=True) if x.dim() == 4 else x.clone() for x in found)

        return run

    backend = Backend("stand-in", "", flash.refuses, only_results(flash.forward), only_results(flash.backward))
    monkeypatch.setattr(partial, "_chosen", lambda *asked: backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("heads", [(8, 2), (2, 2)])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_memory_is_what_a_rank_holds(ranks, heads, dtype, kernel_without_copies):
    shape = RingAttentionConfig(64, heads[0], num_key_heads=heads[1], head_dim=32)
    found = estimate_memory_usage(shape, 1024, ranks, batch_size=2, element_bytes=dtype.itemsize)
    saved, forward, whole = held(shape, 1024, ranks, 2, dtype)
    assert found.saved == saved
    assert found.forward == pytest.approx(forward, rel=0.15)
    assert found.backward == pytest.approx(whole, rel=0.15)
    wrong = estimate_memory_usage(shape, 1024, ranks, batch_size=2, element_bytes=6 - dtype.itemsize)
    assert wrong.forward != pytest.approx(forward, rel=0.15)
    assert wrong.backward != pytest.approx(whole, rel=0.15)


def test_memory_of_other_strategies_is_refused():
    with pytest.raises(ConfigError, match="strategy ulysses: memory is estimated for ring"):
        estimate_memory_usage(config("ulysses"), 4096, 4)


@pytest.mark.parametrize(
    ("shape", "ranks", "words"),
    [
        (config("rings"), 4, r'strategy rings \(did you mean "ring"\?\)'),
        (config("ring"), (2, 2), r"strategy ring cannot use them; \(4, 1\) works"),
        (config("ulysses"), (2, 2), r"strategy ulysses cannot use them; \(1, 4\) works"),
        (config("ulysses"), 3, "cannot be dealt to 3 ranks"),
        (config(layout="zigzga"), 4, 'did you mean "zigzag"'),
        (config(layout="striped", attention="ccgqa"), 4, "layout striped: convolutions .* zigzag works"),
        (config(inner_ring=3), 4, "does not divide the 4 ranks"),
    ],
)
def test_what_a_layer_would_refuse_is_refused(shape, ranks, words):
    with pytest.raises(ConfigError, match=words):
        estimate_context_parallel_efficiency(shape, LENGTH, ranks)


def test_documents_are_of_all_batch_rows_or_of_each():
    shape = config()
    one, each = (
        estimate_context_parallel_efficiency(shape, LENGTH, 3, batch_size=2, documents=documents)
        for documents in (PACKED[:1], PACKED[:1] * 2)
    )
    assert one == each
    with pytest.raises(ValueError, match="documents of 2 rows, and batch_size is 3"):
        estimate_context_parallel_efficiency(shape, LENGTH, 3, batch_size=3, documents=PACKED)
