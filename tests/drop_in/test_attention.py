"""Layers and blocks over ranks inside somebody else's program, against the same on one device."""

import pytest
import torch

from hydra_dist import drop_in
from hydra_dist.context import ContextParallel, SequencePlan, run_ranks
from hydra_dist.drop_in import (
    CCGQAAttention,
    ContextParallelAttention,
    ContextParallelAttentionBlock,
    ContextParallelAttentionConfig,
    RingAttention,
    RingAttentionBlock,
    RingAttentionConfig,
    RingAttentionLayer,
    create_context_parallel_attention,
    create_ring_attention,
)
from hydra_dist.errors import ConfigError
from hydra_dist.model import CCGQA

LENGTH = 35
STARTS = torch.tensor([[0] * 9 + [9] * 20 + [29] * 6, [0] * 35])


def config(kind=ContextParallelAttentionConfig, **settings):
    return kind(32, 4, num_key_heads=2, head_dim=8, **settings)


def step(module, x, weight, seq):
    """Output and gradients, local rows."""
    local = seq.shard(x, 1).requires_grad_()
    out = module.double()(local, seq)
    out.backward(seq.shard(weight, 1))
    rows = [seq.unshard(out.detach(), 1), seq.unshard(local.grad, 1)]
    return rows, [p.grad for p in module.parameters()]


def largest_error(make, ranks, starts, relative_error):
    x, weight = (torch.randn(2, LENGTH, 32, dtype=torch.float64) for _ in range(2))

    def one_rank(mesh):
        module = make(mesh)
        return step(module, x, weight, module.plan(LENGTH, starts))

    results = run_ranks(ranks, one_rank, timeout=30)
    rows, parameters = step((alone := make(None)), x, weight, alone.plan(LENGTH, starts))
    summed = [sum(parts) for parts in zip(*(grads for _, grads in results), strict=True)]
    found, wanted = [*results[0][0], *summed], [*rows, *parameters]
    return max(relative_error(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("starts", [None, STARTS], ids=["one document", "documents"])
@pytest.mark.parametrize("attention", ["gqa", "ccgqa"])
@pytest.mark.parametrize(
    ("strategy", "layout", "ranks"),
    [
        ("ring", "zigzag", (3, 1)),
        ("all_gather", "contiguous", (3, 1)),
        ("ulysses", "zigzag", (1, 4)),
        ("hybrid", "balanced", (2, 2)),
    ],
)
def test_layers_and_blocks_equal_one_device(strategy, layout, ranks, attention, starts, relative_error):
    for kind in (ContextParallelAttention, ContextParallelAttentionBlock):

        def make(mesh, kind=kind):
            # On one device every strategy is the same.
            return kind(config(strategy=strategy, layout=layout, attention=attention, window=11), mesh)

        assert largest_error(make, ranks, starts, relative_error) < 1e-10


@pytest.mark.parametrize("kind", [RingAttentionLayer, RingAttentionBlock])
def test_the_ring_by_name(kind, relative_error):
    def make(mesh):
        return kind(config(RingAttentionConfig, attention="ccgqa"), mesh)

    assert largest_error(make, 4, STARTS, relative_error) < 1e-10
    with pytest.raises(TypeError):
        config(RingAttentionConfig, strategy="ulysses")


def test_the_comparison_rejects_ranks_that_do_not_talk(relative_error, monkeypatch):
    def make(mesh):
        return RingAttentionLayer(config(RingAttentionConfig), mesh)

    assert largest_error(make, 2, None, relative_error) < 1e-10
    attention = SequencePlan.attention

    def local_only(self, q, *others, **options):
        return attention(ContextParallel().plan(q.shape[1]), q, *others, **options)

    monkeypatch.setattr(SequencePlan, "attention", local_only)
    assert largest_error(make, 2, None, relative_error) > 1e-3


def test_attention_alone(relative_error):
    q, k, v = (torch.randn(1, LENGTH, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))

    def one_rank(mesh):
        ring = RingAttention(mesh, layout="contiguous")
        seq = ring.plan(LENGTH)
        return seq.unshard(ring(*(seq.shard(x, 1) for x in (q, k, v)), seq, window=6), 1)

    assert relative_error(run_ranks(4, one_rank)[0], run_ranks(1, one_rank)[0]) < 1e-12


@pytest.mark.parametrize(("strategy", "ranks"), [("ring", (3, 1)), ("ulysses", (1, 2)), ("hybrid", (2, 2))])
def test_without_a_plan_the_sequence_is_as_long_as_the_ranks_make_it(strategy, ranks):
    length = 6 * ranks[0] * ranks[1] + 1
    x = torch.randn(1, length, 32)

    def one_rank(mesh):
        layer = ContextParallelAttention(config(strategy=strategy), mesh)
        seq = layer.plan(length)  # shards are uneven
        local = seq.shard(x, 1)
        assert torch.equal(layer(local), layer(local, seq))
        return seq.geometry.local_length

    assert len(set(run_ranks(ranks, one_rank))) == 2


def test_rows_that_no_layout_deals_need_a_plan():
    def one_rank(mesh):
        layer = create_ring_attention(32, 4, mesh, num_key_heads=2, head_dim=8, layout="contiguous")
        with pytest.raises(ValueError, match=r"x has \[5, 6, 9\] rows .* as \[6, 7, 7\]; pass a plan"):
            layer(torch.randn(1, (5, 6, 9)[mesh.rank], 32))
        return True

    assert run_ranks(3, one_rank) == [True] * 3


def test_modules_share_the_ranks_of_one_context(relative_error):
    x = torch.randn(1, LENGTH, 32, dtype=torch.float64)

    def one_rank(mesh):
        context = ContextParallel(mesh, layout="contiguous")
        layers = [create_ring_attention(32, 4, context, layout="contiguous", seed=seed).double() for seed in (0, 1)]
        assert all(layer.context is context for layer in layers)
        seq, ring = context.plan(LENGTH), RingAttention(context, layout="contiguous")
        for name, wrong in (("layout", {}), ("inner_ring", {"layout": "contiguous", "inner_ring": 1})):
            with pytest.raises(ConfigError, match=f"{name} .*ContextParallel that was passed in has {name}"):
                create_ring_attention(32, 4, context, **wrong)
        local = seq.shard(x, 1)
        for layer in layers:
            local = layer(local, seq)
        q = local.unflatten(-1, (4, 8))
        return seq.unshard(ring(q, q, q, seq).flatten(2), 1)

    assert relative_error(run_ranks(3, one_rank)[0], run_ranks(1, one_rank)[0]) < 1e-12


def test_starting_values_are_the_same_on_all_ranks_and_follow_the_seed():
    def values(seed):
        return [
            next(layer.parameters())
            for layer in run_ranks(2, lambda mesh: create_ring_attention(32, 4, mesh, seed=seed))
        ]

    first, second = values(0)
    assert torch.equal(first, second)
    assert not torch.equal(first, values(1)[0])
    assert float(first.detach().std()) == pytest.approx(0.02, rel=0.2)


def test_keywords_of_the_model_reach_the_layer():
    layer = create_context_parallel_attention(64, 4, attention="ccgqa", conv_kernel_sizes=(3, 2), use_output_norm=True)
    assert layer.attention.prologue.num_rows_before == 3
    assert layer.attention.output_norm is not None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layuot": "zigzag"}, r'layuot: unknown setting \(did you mean "layout"\?\)'),
        ({"num_key_heads": 3}, "num_query_heads 4"),
        ({"layout": "zigzga"}, 'did you mean "zigzag"'),
        ({"strategy": "rings"}, 'did you mean "ring"'),
        ({"attention": "mla"}, "mla"),
    ],
)
def test_mistakes_are_told_in_one_message(settings, words):
    with pytest.raises(ConfigError, match=words):
        create_context_parallel_attention(64, 4, **settings)


def test_a_width_that_heads_do_not_divide_needs_a_head_dim():
    with pytest.raises(ConfigError, match="hidden_size 30 is not a multiple of num_query_heads 4; a head_dim"):
        create_ring_attention(30, 4)
    create_ring_attention(30, 4, head_dim=8)


def test_ccgqa_by_its_other_name_is_the_same_layer():
    layer = CCGQAAttention(64, 4, 2, 16, seed=3)
    assert isinstance(layer, CCGQA)
    assert float(layer.down.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert layer(torch.randn(1, 5, 64)).shape == (1, 5, 64)


def test_every_public_name_exists():
    assert all(hasattr(drop_in, name) for name in drop_in.__all__)
