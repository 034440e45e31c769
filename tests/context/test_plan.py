"""Plans: dealing rows out and gathering them, what a plan says of its rows, and what it refuses."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_dist.context import ContextParallel, run_ranks
from hydra_dist.context.documents import documents_of
from hydra_dist.costs.layout import LAYOUTS
from hydra_dist.errors import ConfigError


def starts_of(*rows, length):
    starts = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, positions in enumerate(rows):
        for position in positions:
            starts[row, position:] = position
    return starts


GRIDS = [(1, 1), (2, 1), (3, 1), (4, 1), (6, 1), (1, 3), (1, 4), (2, 2), (2, 3), (3, 2)]


@st.composite
def plans(draw):
    """(grid, settings of ContextParallel, settings of its plan): layouts and explicit dealings, with documents."""
    ring, ulysses = grid = draw(st.sampled_from(GRIDS))
    length = draw(st.integers(24, 40))
    starts = draw(st.none() | st.sets(st.integers(1, length - 1), max_size=5).map(lambda found: sorted(found)))
    making = {"strategy": "hybrid" if ulysses > 1 else "ring", "layout": draw(st.sampled_from(LAYOUTS))}
    dealing = None
    if draw(st.booleans()):
        cuts = sorted(draw(st.sets(st.integers(1, length // 4 - 1), min_size=ring - 1, max_size=ring - 1)))
        edges = [0, *(4 * edge for edge in cuts), length]
        pieces = [range(start, stop) for start, stop in itertools.pairwise(edges)]
        dealing = [[piece] for piece in draw(st.permutations(pieces))]
    packed = None if starts is None else starts_of(starts, length=length)
    return grid, making, {"sequence_length": length, "document_starts": packed, "dealing": dealing}


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(-3, 2), st.booleans())
def test_unshard_inverts_shard(plan, dim, integers):
    grid, making, plan_of = plan
    length = plan_of["sequence_length"]
    shape = [2, 3, 2]
    shape[dim] = length
    x = torch.randint(100, shape) if integers else torch.randn(shape)

    def there_and_back(mesh):
        seq = ContextParallel(mesh, **making).plan(**plan_of)
        local = seq.shard(x, dim)
        assert torch.equal(local, x.index_select(dim, seq.positions))
        assert local.is_contiguous()
        assert seq.positions.numel() == sum(seq.chunk_lengths) == local.shape[dim]
        if plan_of["document_starts"] is not None:
            assert torch.equal(seq.document_starts, plan_of["document_starts"][:, seq.positions])
            assert torch.equal(seq.ages, (seq.positions - seq.document_starts).int())
        edges = [0, *itertools.accumulate(seq.chunk_lengths)]
        steps = {int(step) for a, b in itertools.pairwise(edges) for step in seq.positions[a:b].diff()}
        assert len(steps) <= 1
        return seq.unshard(local, dim), seq.positions

    results = run_ranks(grid, there_and_back)
    assert all(torch.equal(back, x) for back, _ in results)
    assert torch.cat([positions for _, positions in results]).sort().values.tolist() == list(range(length))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid", [(1, 1), (3, 1), (2, 2)])
def test_gradients_of_shard_and_unshard_add_up_over_ranks(grid, layout):
    ranks = grid[0] * grid[1]
    x = torch.randn(2, 13, 3, dtype=torch.float64)
    weights = torch.randn(ranks, 2, 13, 3, dtype=torch.float64)

    def one_rank(mesh):
        seq = ContextParallel(mesh, "hybrid", layout).plan(13)
        leaf = x.clone().requires_grad_()
        whole = seq.unshard(seq.shard(leaf * 2, 1) ** 2, 1)
        (whole * weights[mesh.rank]).sum().backward()
        return leaf.grad

    leaf = x.clone().requires_grad_()
    ((leaf * 2) ** 2 * weights.sum(0)).sum().backward()
    torch.testing.assert_close(sum(run_ranks(grid, one_rank)), leaf.grad, rtol=0, atol=1e-13)


def test_unshard_can_be_differentiated_twice():
    def one_rank(mesh):
        seq = ContextParallel(mesh).plan(9)
        local = seq.shard(torch.arange(9.0, dtype=torch.float64), 0).requires_grad_()
        (first,) = torch.autograd.grad((seq.unshard(local, 0) ** 3).sum(), local, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), local)
        return local.detach(), first.detach(), second

    for local, first, second in run_ranks(2, one_rank):
        # Both ranks have the same objective, so each gradient counts twice, and so does its gradient's way back.
        torch.testing.assert_close(first, 2 * 3 * local**2)
        torch.testing.assert_close(second, 2 * 6 * local)


def test_a_plan_knows_the_documents_of_its_rows():
    starts = starts_of([3, 10], [5], length=12)

    def one_rank(mesh):
        seq = ContextParallel(mesh).plan(12, starts)
        return seq.positions.tolist(), seq.document_starts.tolist(), seq.chunk_lengths

    assert run_ranks(2, one_rank) == [
        ([0, 1, 2, 9, 10, 11], [[0, 0, 0, 3, 10, 10], [0, 0, 0, 5, 5, 5]], (3, 3)),
        ([3, 4, 5, 6, 7, 8], [[3, 3, 3, 3, 3, 3], [0, 0, 5, 5, 5, 5]], (6,)),
    ]


def test_one_device_needs_no_mesh():
    seq = ContextParallel().plan(5)
    assert seq.positions.tolist() == [0, 1, 2, 3, 4]
    assert seq.document_starts is None
    assert seq.chunk_lengths == (5,)
    x = torch.randn(1, 5)
    assert torch.equal(seq.unshard(seq.shard(x, 1), 1), x)


def test_stats_are_those_of_one_plan_and_the_whole_adds_up():
    def one_rank(mesh):
        context = ContextParallel(mesh)
        for _ in range(2):
            seq = context.plan(16)
            x = seq.shard(torch.randn(1, 16, 1, 4), 1)
            seq.attention(x, x, x)
        return seq.stats()["forward"], context.traffic.stats()["forward"]

    # Rank 1 sees the first 4 of rank 0's keys, and rank 0's late rows see all 8 of rank 1's.
    for rows, (last, total) in zip((4, 8), run_ranks(2, one_rank), strict=True):
        sent = 2 * rows * 4 * 4
        assert last == {
            "bytes": sent,
            "messages": 1,
            "hops": 1,
            "kinds": {"keys": {"bytes": sent, "messages": 1, "hops": 1}},
        }
        assert (total["bytes"], total["messages"]) == (2 * sent, 2)


def test_geometries_are_kept_and_given_up():
    context = ContextParallel()
    first = context.plan(4).geometry
    assert context.plan(4).geometry is first
    for length in range(5, 25):
        context.plan(length)
    assert context.plan(4).geometry is not first


@pytest.mark.parametrize(
    "settings_,message",
    [
        (
            {"strategy": "rnig"},
            r'context.strategy: rnig \(did you mean "ring"\?\); ring, all_gather, ulysses and hybrid exist',
        ),
        ({"strategy": "megatron"}, "context.strategy: megatron; ring, all_gather, ulysses and hybrid exist"),
        (
            {"layout": "stripd"},
            r'context.layout: stripd \(did you mean "striped"\?\); zigzag, contiguous, striped and balanced exist',
        ),
    ],
)
def test_unknown_names_are_refused(settings_, message):
    with pytest.raises(ConfigError, match=message):
        ContextParallel(**settings_)


def test_the_ring_refuses_a_ulysses_dimension():
    with pytest.raises(ConfigError, match=r"the ulysses dimension has 2 ranks; a mesh of 4 x 1 .*works"):
        run_ranks((2, 2), ContextParallel)


def test_what_attention_refuses():
    seq = ContextParallel().plan(8, torch.zeros(2, 8, dtype=torch.int32))
    q = torch.zeros(2, 8, 4, 2)
    with pytest.raises(ConfigError, match="sparse=None"):
        seq.attention(q, q, q, sparse="topk")
    with pytest.raises(ConfigError, match=r"model\.window 0"):
        seq.attention(q, q, q, window=0)
    with pytest.raises(ValueError, match=r"logit_bound -1\.0"):
        seq.attention(q, q, q, logit_bound=-1.0)
    with pytest.raises(ValueError, match="q has 7 rows and this rank holds 8 of 8"):
        seq.attention(q[:, :7], q, q)
    with pytest.raises(ValueError, match="k has 7 rows"):
        seq.attention(q, q[:, :7], q[:, :7])
    with pytest.raises(ValueError, match="has 1 batch rows and document_starts has 2"):
        seq.attention(q[:1], q[:1], q[:1])
    with pytest.raises(ValueError, match="not a multiple"):
        seq.attention(q, q[:, :, :3], q[:, :, :3])


def test_what_sharding_refuses():
    seq = ContextParallel().plan(8)
    with pytest.raises(ValueError, match="it must have 8"):
        seq.shard(torch.zeros(1, 7), 1)
    with pytest.raises(ValueError, match="it must have 8"):
        seq.unshard(torch.zeros(1, 7), 1)


def test_documents_are_read_from_their_starts():
    assert documents_of(starts_of([1, 2, 6], [], length=8), 8) == ((0, 1, 2, 6), (0,))


@pytest.mark.parametrize(
    "wrong,message",
    [
        (torch.zeros(8, dtype=torch.int64), r"has shape \[8\]"),
        (torch.zeros(1, 7, dtype=torch.int64), r"\[batch, 8\] is wanted"),
        (torch.zeros(1, 8), r"is torch\.float32"),
        (torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1]]), r"document_starts\[0, 0\] is 1"),
        (torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]]), r"document_starts\[0, 2\] is 1"),
        (torch.tensor([[0, 0, 2, 0, 0, 0, 0, 0]]), r"document_starts\[0, 3\] is 0"),
        (torch.tensor([[0, 0, 0, 5, 5, 5, 5, 5]]), r"document_starts\[0, 3\] is 5"),
    ],
)
def test_starts_that_are_none_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ContextParallel().plan(8, wrong)


def test_a_sequence_shorter_than_the_pieces_is_refused():
    with pytest.raises(ConfigError, match=r"a sequence of 8 or more or context\.size 3 works"):
        run_ranks(4, lambda mesh: ContextParallel(mesh).plan(7))
