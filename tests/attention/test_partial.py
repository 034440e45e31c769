"""Attention in pieces, as the ranks of a ring compute it, against the reference on the whole."""

import pytest
import torch

from hydra_dist.attention import (
    LARGEST_LOGIT_BOUND,
    Mask,
    attend_tiles,
    attend_tiles_backward,
    attention,
    merge_rule,
    reference,
)
from hydra_dist.attention.merge import LogSumExp, PlainAddition
from hydra_dist.attention.partial import _Seen
from hydra_dist.costs.tiles import Span, Tile, tiles

LENGTH = 97


def zigzag(length, num_ranks):
    """Rows of each rank: pieces r and 2P-1-r of 2P."""
    edges = [i * length // (2 * num_ranks) for i in range(2 * num_ranks + 1)]
    pieces = [(edges[i], edges[i + 1]) for i in range(2 * num_ranks)]
    return [(pieces[r], pieces[2 * num_ranks - 1 - r]) for r in range(num_ranks)]


def spans(pieces):
    (a, b), (c, d) = pieces
    return Span(0, b - a, a), Span(b - a, b - a + d - c, c)


def rows(x, pieces):
    return torch.cat([x[:, a:b] for a, b in pieces], 1)


def in_pieces(tensors, mask, num_ranks, backend="auto", reverse=False, fresh=False, logit_bound=None):
    """Every rank attends over every rank's keys, one after the other; the whole out, lse, dq, dk, dv."""
    rule = merge_rule(logit_bound)
    q, k, v, grad_out = tensors
    wide = torch.promote_types(q.dtype, torch.float32)
    documents = mask.document_positions(q.shape[1], k.shape[1])
    scale = q.shape[-1] ** -0.5
    out, lse = torch.zeros(q.shape, dtype=wide), torch.zeros(q.shape[0], q.shape[2], q.shape[1], dtype=wide)
    grads = [torch.zeros(x.shape, dtype=wide) for x in (q, k, v)]
    layout = zigzag(q.shape[1], num_ranks)
    for own in layout:
        local_q, local_grad = rows(q, own), rows(grad_out, own)
        local_out, local_lse = rule.start(local_q)
        hops = []
        for hop, visiting in enumerate(layout[::-1] if reverse else layout):
            found = tiles(spans(own), spans(visiting), causal=mask.causal, window=mask.window, documents=documents)
            local_k, local_v = rows(k, visiting), rows(v, visiting)
            hops.append((visiting, local_k, local_v, found))
            options = {"scale": scale, "backend": backend}
            fresh_now = fresh and hop == 0
            sums = {"out": local_out, "lse": local_lse, "rule": rule}
            attend_tiles(local_q, local_k, local_v, found, fresh=fresh_now, **sums, **options)
        local_out, local_lse = rule.finish(local_out, local_lse, wide)
        local_grad_q = torch.zeros(local_q.shape, dtype=wide)
        for visiting, local_k, local_v, found in hops:
            local_grads = local_grad_q, torch.zeros(local_k.shape, dtype=wide), torch.zeros(local_v.shape, dtype=wide)
            attend_tiles_backward(
                local_grad,
                local_q,
                local_k,
                local_v,
                local_out,
                local_lse,
                found,
                **options,
                **dict(zip(("grad_q", "grad_k", "grad_v"), local_grads, strict=True)),
            )
            add_rows(grads[1], local_grads[1], visiting)
            add_rows(grads[2], local_grads[2], visiting)
        add_rows(grads[0], local_grad_q, own)
        add_rows(out, local_out, own)
        add_rows(lse.transpose(1, 2), local_lse.transpose(1, 2), own)
    return out, lse, *grads


def add_rows(x, local, pieces):
    start = 0
    for a, b in pieces:
        x[:, a:b] += local[:, start : start + b - a]
        start += b - a


def on_the_whole(tensors, mask):
    q, k, v, grad_out = tensors
    allowed, scale = mask.allowed(q.shape[1], k.shape[1]), q.shape[-1] ** -0.5
    out, lse = reference.forward(q, k, v, allowed, scale)
    return out, lse, *reference.backward(grad_out, q, k, v, out, lse, allowed, scale)


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("backend", ["flash", "reference"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("logit_bound", [None, LARGEST_LOGIT_BOUND])
def test_fp64(inputs, difference, mask, num_ranks, backend, reverse, logit_bound):
    tensors = inputs(q_length=LENGTH, heads=(4, 2))
    results = in_pieces(tensors, mask, num_ranks, backend, reverse, logit_bound=logit_bound)
    for ours, expected in zip(results, on_the_whole(tensors, mask), strict=True):
        assert difference(ours, expected) < 1e-12


@pytest.mark.parametrize("num_ranks", [1, 4])
@pytest.mark.parametrize("logit_bound", [None, LARGEST_LOGIT_BOUND])
def test_fp32(inputs, difference, mask, num_ranks, logit_bound):
    tensors = [x.float() for x in inputs(q_length=LENGTH, heads=(4, 2), head_dim=64)]
    expected = on_the_whole([x.double() for x in tensors], mask)
    results = in_pieces(tensors, mask, num_ranks, fresh=True, logit_bound=logit_bound)
    for ours, exact, bound in zip(results, expected, (1e-6, 1e-6, 5e-6, 5e-6, 5e-6), strict=True):
        assert difference(ours, exact) < bound


def test_the_checks_above_reject_a_mean_of_the_parts(inputs, difference, monkeypatch):
    def mean(self, out, lse, part_out, part_lse, all_see_keys=False):
        out.add_(part_out).mul_(0.5)
        torch.logaddexp(lse, part_lse, out=lse)

    def count(self, out, lse, part_out, part_lse, all_see_keys=False):
        out.add_(part_out)
        lse.add_(1.0)

    monkeypatch.setattr(LogSumExp, "add", mean)
    monkeypatch.setattr(PlainAddition, "add", count)
    tensors = inputs(q_length=LENGTH)
    for logit_bound in (None, LARGEST_LOGIT_BOUND):
        results = in_pieces(tensors, Mask(), 3, logit_bound=logit_bound)
        for ours, expected in zip(results, on_the_whole(tensors, Mask()), strict=True):
            if ours.dim() == 4 and ours.shape[2] == 4:
                assert difference(ours, expected) > 1e-2


def rms(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_ranks,logit_bound", [(4, None), (16, None), (16, LARGEST_LOGIT_BOUND)])
def test_half_precision_loses_no_more_in_pieces(inputs, dtype, num_ranks, logit_bound):
    """Root mean square error against fp64 over 5 seeds, at most 1.15 times that of one device."""
    errors = torch.zeros(5, 2, 4)
    for seed in range(5):
        torch.manual_seed(seed)
        tensors = [x.to(dtype) for x in inputs(1, 256, heads=(4, 2), head_dim=64)]
        exact = on_the_whole([x.double() for x in tensors], Mask())
        pieces = in_pieces(tensors, Mask(), num_ranks, logit_bound=logit_bound)
        leaves = [x.clone().requires_grad_() for x in tensors[:3]]
        out, _ = attention(*leaves)
        whole = out, None, *torch.autograd.grad(out, leaves, tensors[3])
        for column, index in enumerate((0, 2, 3, 4)):
            errors[seed, 0, column] = rms(pieces[index].to(dtype), exact[index])
            errors[seed, 1, column] = rms(whole[index], exact[index])
    mean = errors.square().mean(0).sqrt()
    assert (mean[0] <= 1.15 * mean[1]).all(), mean
    assert (mean < (6e-3 if dtype == torch.bfloat16 else 6e-4)).all(), mean


def test_queries_whose_keys_come_later_or_never(inputs):
    q, k, v, grad_out = inputs(1, 6)
    out, lse = torch.zeros_like(q), torch.full((1, 4, 6), -torch.inf, dtype=q.dtype)
    late = tiles((Span(0, 6, 0),), (Span(0, 6, 4),), causal=True, window=None, documents=None)
    attend_tiles(q, k, v, late, scale=1.0, out=out, lse=lse)
    assert torch.equal(out[:, :4], torch.zeros_like(out[:, :4]))
    assert bool((lse[..., :4] == -torch.inf).all())
    assert bool(torch.isfinite(lse[..., 4:]).all())
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    arguments = dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True))
    attend_tiles_backward(grad_out, q, k, v, out, lse, late, scale=1.0, **arguments)
    assert torch.equal(grads[0][:, :4], torch.zeros_like(out[:, :4]))
    assert torch.equal(grads[1][:, 2:], torch.zeros_like(k[:, 2:]))
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)


def test_no_tiles_and_no_rows_change_nothing(inputs):
    q, k, v, _ = inputs(1, 6)
    out, lse = torch.zeros_like(q), torch.full((1, 4, 6), -torch.inf, dtype=q.dtype)
    attend_tiles(q, k, v, (), scale=1.0, out=out, lse=lse)
    attend_tiles(q, k[:, :0], v[:, :0], (), scale=1.0, out=out, lse=lse)
    attend_tiles(q[:0], k[:0], v[:0], (Tile(None, 0, 6, 0, 6, "full"),), scale=1.0, out=out[:0], lse=lse[:0])
    assert bool((lse == -torch.inf).all())
    assert not out.any()


def test_running_results_are_wide_and_on_the_device_of_q(inputs):
    q, k, v, _ = inputs(1, 6, dtype=torch.bfloat16)
    lse = torch.full((1, 4, 6), -torch.inf)
    with pytest.raises(ValueError, match=r"out is torch\.bfloat16"):
        attend_tiles(q, k, v, (), scale=1.0, out=torch.zeros_like(q), lse=lse)
    with pytest.raises(ValueError, match="out is on meta"):
        attend_tiles(q, k, v, (), scale=1.0, out=torch.zeros(q.shape, device="meta"), lse=lse)


def test_first_tiles_are_recognised():
    def tile(batch, start, stop):
        return Tile(batch, start, stop, 0, 1, "full")

    seen = _Seen()
    assert seen.is_first(tile(0, 0, 5))
    assert not seen.is_first(tile(0, 4, 6))
    assert seen.is_first(tile(0, 6, 7))
    assert seen.is_first(tile(1, 0, 5))
    assert not seen.is_first(tile(None, 5, 8))
    assert not seen.is_first(tile(1, 7, 9))
    assert seen.is_first(tile(1, 9, 10))
