"""Attention over gathered keys: slices of heads, who gives what to whom, and the order of sums."""

import dataclasses
import gc
import weakref

import pytest
import torch

from hydra_dist.attention import LARGEST_LOGIT_BOUND
from hydra_dist.context import ContextParallel, run_ranks, schedules
from hydra_dist.context.gather import AllGather, _Home
from hydra_dist.costs import gather
from hydra_dist.costs.layout import LAYOUTS

MASKS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 20},
    "documents_by_row": {"documents": ((0, 13, 34), (0, 1, 50))},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("slice_bytes", [1, 4 * 67 * 2 * 8 * 8])
@pytest.mark.parametrize("logit_bound", [None, LARGEST_LOGIT_BOUND])
def test_slices_of_heads_change_nothing(
    problem, whole, over_ranks, errors, monkeypatch, layout, mask, slice_bytes, logit_bound
):
    case = problem(num_query_heads=6, num_key_heads=3, **MASKS[mask])
    monkeypatch.setattr(gather, "SMALLEST_SLICE", slice_bytes)  # one head at a time, and two
    assert max(errors(over_ranks(case, 3, layout, logit_bound, strategy="all_gather")[0], whole(case))) < 1e-12


def test_two_slices_are_held_at_a_time(problem, over_ranks, monkeypatch):
    monkeypatch.setattr(gather, "SMALLEST_SLICE", 1)
    start, alive, most = AllGather._start, [], []

    def watched(self, *args):
        found = start(self, *args)
        alive.append(weakref.ref(found[0]))
        gc.collect()
        most.append(sum(ref() is not None for ref in alive))
        return found

    monkeypatch.setattr(AllGather, "_start", watched)
    over_ranks(problem(num_query_heads=6, num_key_heads=6), 2, strategy="all_gather")
    assert len(most) == 2 * 2 * 6  # ranks, forward and backward, slices
    assert max(most) <= 2 * 2


def test_only_the_keys_that_queries_see_are_held(problem):
    def one_rank(mesh):
        seq = ContextParallel(mesh, "all_gather", "contiguous").plan(64)
        return [seq.strategy.gathering_of(True, window).num_rows for window in (None, 1, 9, 33)]

    assert run_ranks(4, one_rank) == [[16, 16, 16, 16], [32, 16, 24, 32], [48, 16, 24, 48], [64, 16, 24, 48]]


def test_repeated_runs_give_the_same_bits(problem, over_ranks):
    case = problem(dtype=torch.bfloat16)
    first, second = (over_ranks(case, 4, strategy="all_gather")[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def rejects(problem, whole, over_ranks, errors, **settings):
    case = problem(sequence_length=64, **settings)
    out, *gradients = errors(over_ranks(case, 4, strategy="all_gather")[0], whole(case))
    return out > 1e-2, max(gradients) > 1e-2


def test_the_check_accepts_what_is_right(problem, whole, over_ranks, errors):
    assert rejects(problem, whole, over_ranks, errors) == (False, False)


def test_the_check_rejects_first_rows_given_for_those_that_are_wanted(problem, whole, over_ranks, errors, monkeypatch):
    right = schedules.gathering

    def first_rows(*args):
        found = right(*args)
        gives = tuple((reader, dataclasses.replace(share, row=0)) for reader, share in found.gives)
        return dataclasses.replace(found, gives=gives)

    monkeypatch.setattr(schedules, "gathering", first_rows)
    assert rejects(problem, whole, over_ranks, errors) == (True, True)


def test_the_check_rejects_rows_taken_from_another_owner(problem, whole, over_ranks, errors, monkeypatch):
    right = schedules.gathering

    def next_owner(dealing, rank, mask, spans):
        found = right(dealing, rank, mask, spans)
        others = [share for share in found.takes if share.owner != rank]
        owners = {share.owner: after.owner for share, after in zip(others, others[1:] + others[:1], strict=True)}
        takes = tuple(dataclasses.replace(share, owner=owners.get(share.owner, rank)) for share in found.takes)
        return dataclasses.replace(found, takes=takes)

    # Documents of a chunk each but for a row, so that each rank takes as many rows of each owner under a full mask.
    case = problem(sequence_length=64, causal=False, documents=((0, 15, 31, 47), (0,)))
    assert max(errors(over_ranks(case, 4, "contiguous", strategy="all_gather")[0], whole(case))) < 1e-12
    monkeypatch.setattr(schedules, "gathering", next_owner)
    assert min(errors(over_ranks(case, 4, "contiguous", strategy="all_gather")[0], whole(case))) > 1e-2


def test_the_check_rejects_gradients_added_to_the_rows_of_another_share(
    problem, whole, over_ranks, errors, monkeypatch
):
    settle = _Home.settle

    def first_rows(self):
        self._came = [(owner, dataclasses.replace(share, row=0), part) for owner, share, part in self._came]
        settle(self)

    monkeypatch.setattr(_Home, "settle", first_rows)
    assert rejects(problem, whole, over_ranks, errors) == (False, True)


def test_the_check_rejects_gradients_of_own_queries_only(problem, whole, over_ranks, errors, monkeypatch):
    settle = _Home.settle

    def own(self):
        self._work.wait()
        self._came = [came for came in self._came if came[0] == self.transport.rank]
        settle(self)

    monkeypatch.setattr(_Home, "settle", own)
    assert rejects(problem, whole, over_ranks, errors) == (False, True)
