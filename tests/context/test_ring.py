"""Ring attention against attention on one device."""

import itertools

import pytest
import torch

from hydra_dist.attention import LARGEST_LOGIT_BOUND, attention
from hydra_dist.attention.merge import LogSumExp, PlainAddition
from hydra_dist.context import ContextParallel, run_ranks
from hydra_dist.context.emulated import EmulatedTransport
from hydra_dist.context.geometry import Geometry
from hydra_dist.costs.layout import chunks
from hydra_dist.costs.needs import MaskRule
from hydra_dist.costs.rotation import RingPath, journeys

RANKS = (1, 2, 3, 4, 8)
LAYOUTS = ("zigzag", "contiguous")
MASKS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 9},
    "window_wider_than_a_shard": {"window": 40},
    "documents": {"documents": ((0, 1, 2, 20, 33, 60),) * 2},
    "documents_by_row": {"documents": ((0, 13, 34), (0, 1, 50))},
    "documents_full": {"causal": False, "documents": ((0, 13, 34), (0, 5, 6, 7, 59))},
    "documents_window": {"window": 6, "documents": ((0, 30), (0, 8, 16, 24, 32, 40, 48))},
}
HEADS = ((4, 4), (4, 2), (4, 1))
LENGTHS = (61, 67, 513)
SHAPES = list(itertools.product(HEADS, LENGTHS))
SHORT = [pair for pair in SHAPES if pair[1] < 100]
# Every pair of (ranks, layout) meets every mask; heads and lengths take turns.
COVER = [
    (ranks, layout, mask, *(SHAPES if ranks < 4 and turn % 5 == 0 else SHORT)[turn % 4])
    for turn, (ranks, layout, mask) in enumerate(itertools.product(RANKS, LAYOUTS, MASKS))
]


def check(problem, whole, over_ranks, errors, ranks, layout, mask, heads, length):
    case = problem(sequence_length=length, num_query_heads=heads[0], num_key_heads=heads[1], **MASKS[mask])
    wanted = whole(case)
    for logit_bound in (None, LARGEST_LOGIT_BOUND):
        found, _ = over_ranks(case, ranks, layout, logit_bound)
        assert max(errors(found, wanted)) < 1e-12


@pytest.mark.parametrize("ranks,layout,mask,heads,length", COVER)
def test_output_and_gradients_equal_one_device(problem, whole, over_ranks, errors, ranks, layout, mask, heads, length):
    check(problem, whole, over_ranks, errors, ranks, layout, mask, heads, length)


@pytest.mark.full
@pytest.mark.parametrize(
    "ranks,layout,mask,heads,length", list(itertools.product(RANKS, LAYOUTS, MASKS, HEADS, LENGTHS))
)
def test_the_whole_grid(problem, whole, over_ranks, errors, ranks, layout, mask, heads, length):
    check(problem, whole, over_ranks, errors, ranks, layout, mask, heads, length)


def test_as_many_rows_as_pieces(problem, whole, over_ranks, errors):
    case = problem(sequence_length=16, documents=((0, 3, 4), (0, 15)))
    assert max(errors(over_ranks(case, 8)[0], whole(case))) < 1e-12


@pytest.mark.parametrize("ranks", [4, 8])
def test_keys_pass_through_ranks_that_need_none(problem, whole, over_ranks, errors, ranks):
    # The first document ends with rank 0's first piece, and the last one begins just before rank 0's last piece.
    pieces = 2 * ranks
    case = problem(sequence_length=4 * pieces, documents=((0, 4, 4 * pieces - 6),) * 2)
    dealing = chunks("zigzag", case.sequence_length, ranks)
    for side in ("keys", "queries"):
        mask = MaskRule(True, None, case.documents)
        found = journeys(dealing, mask, RingPath(ranks, reverse=side == "queries"), side)
        assert any(journey.first > 1 for journey in found)
        assert max(errors(over_ranks(case, ranks, rotates=side)[0], whole(case))) < 1e-12


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("mask", ["causal", "documents_by_row"])
@pytest.mark.parametrize("logit_bound", [None, LARGEST_LOGIT_BOUND])
def test_fp32(problem, whole, over_ranks, errors, ranks, mask, logit_bound):
    case = problem(sequence_length=301, dtype=torch.float32, head_dim=16, **MASKS[mask])
    found, _ = over_ranks(case, ranks, logit_bound=logit_bound)
    out, *gradients = errors(found, whole(case, dtype=torch.float64))
    assert out < 1e-6
    assert max(gradients) < 5e-6


@pytest.mark.parametrize("ranks,logit_bound", [(4, None), (16, None), (16, LARGEST_LOGIT_BOUND)])
def test_bf16_loses_no_more_than_one_device_does(problem, whole, over_ranks, ranks, logit_bound):
    def squares(found, exact):
        return [((a.double() - b) ** 2).mean() for a, b in zip(found, exact, strict=True)]

    ours, single = torch.zeros(4).double(), torch.zeros(4).double()
    for seed in range(5):
        case = problem(sequence_length=256, batch_size=1, head_dim=16, dtype=torch.bfloat16, seed=seed)
        exact = whole(case, dtype=torch.float64)
        ours += torch.stack(squares(over_ranks(case, ranks, logit_bound=logit_bound)[0], exact))
        single += torch.stack(squares(whole(case, backend="auto"), exact))
    assert (ours / single).sqrt().max() < 1.15


def test_gradients_travel_in_fp32_for_bf16_keys(problem, over_ranks):
    _, stats = over_ranks(problem(sequence_length=64, dtype=torch.bfloat16), 2)
    keys, gradients = (
        sum(sent["backward"]["kinds"][kind]["bytes"] for sent in stats) for kind in ("keys", "key gradients")
    )
    assert gradients == 2 * keys > 0


def test_a_window_sends_less_than_no_window(problem, over_ranks):
    far = over_ranks(problem(), 8, "contiguous")[1]
    near = over_ranks(problem(window=3), 8, "contiguous")[1]
    assert sum(s["forward"]["messages"] for s in near) == 7 < sum(s["forward"]["messages"] for s in far) == 28


def test_only_a_small_enough_bound_leads_to_plain_addition(problem, over_ranks, monkeypatch):
    calls = []
    add = PlainAddition.add

    def counted(self, *args, **kwargs):
        calls.append(1)
        add(self, *args, **kwargs)

    monkeypatch.setattr(PlainAddition, "add", counted)
    for logit_bound in (None, LARGEST_LOGIT_BOUND + 0.1):
        over_ranks(problem(), 2, logit_bound=logit_bound)
        assert not calls
    over_ranks(problem(), 2, logit_bound=LARGEST_LOGIT_BOUND)
    assert calls


def test_a_broken_promise_is_nan_and_not_a_wrong_number(problem, over_ranks, whole, errors):
    scale = 100.0  # of the scores: most rows then have one below -61 or above 88

    def one_rank(mesh, logit_bound):
        seq = ContextParallel(mesh).plan(67)
        q, k, v, _ = (seq.shard(x, 1) for x in problem(dtype=torch.float32).inputs())
        return seq.unshard(seq.attention(q, k, v, scale=scale, logit_bound=logit_bound), 1)

    general = run_ranks(2, lambda mesh: one_rank(mesh, None))[0]
    broken = run_ranks(2, lambda mesh: one_rank(mesh, 1.0))[0]
    q, k, v, _ = problem().inputs()
    exact, _ = attention(q, k, v, scale=scale, backend="reference")
    assert errors([general], [exact])[0] < 1e-3
    right = (broken.double() - exact).abs() < 1e-3
    assert bool((right | ~torch.isfinite(broken)).all())
    assert not bool(right.all())


def rejects(problem, whole, over_ranks, errors, ranks=4, logit_bound=None):
    case = problem()
    return max(errors(over_ranks(case, ranks, logit_bound=logit_bound)[0], whole(case))) > 1e-3


def test_the_check_rejects_a_merge_that_ignores_lse(problem, whole, over_ranks, errors, monkeypatch):
    def average(self, out, lse, part_out, part_lse, all_see_keys=False):
        out.lerp_(part_out.to(out.dtype), 0.5)
        torch.logaddexp(lse, part_lse, out=lse)

    def equal_weights(self, out, lse, part_out, part_lse, all_see_keys=False):
        out.add_(part_out)
        lse.add_(1.0)

    monkeypatch.setattr(LogSumExp, "add", average)
    monkeypatch.setattr(PlainAddition, "add", equal_weights)
    assert rejects(problem, whole, over_ranks, errors)
    assert rejects(problem, whole, over_ranks, errors, logit_bound=LARGEST_LOGIT_BOUND)


def test_the_check_rejects_zigzag_rows_read_as_one_run(problem, whole, over_ranks, errors, monkeypatch):
    spans = Geometry.spans

    def one_run(self, rank, rows=None):
        found = spans(self, rank, rows)
        return [type(found[0])(0, found[-1].row_stop, found[0].position)]

    monkeypatch.setattr(Geometry, "spans", one_run)
    assert rejects(problem, whole, over_ranks, errors, ranks=2)


def test_the_check_rejects_gradients_that_do_not_come_home(problem, whole, over_ranks, errors, monkeypatch):
    exchange = EmulatedTransport.exchange

    def forgetful(self, sends, receives, *, direction, kind):
        if kind == "key gradients":
            sends = [(peer, torch.zeros_like(x)) for peer, x in sends]
        return exchange(self, sends, receives, direction=direction, kind=kind)

    monkeypatch.setattr(EmulatedTransport, "exchange", forgetful)
    assert rejects(problem, whole, over_ranks, errors)
