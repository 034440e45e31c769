"""What runs count as sent is what the closed forms of costs/ say, to the byte and the message."""

import itertools

import pytest
import torch

from hydra_dist.costs import gather
from hydra_dist.costs.gather import gather_traffic
from hydra_dist.costs.layout import LAYOUTS, chunks, cut, lengths
from hydra_dist.costs.needs import MaskRule
from hydra_dist.costs.rotation import Heads, ring_traffic
from hydra_dist.costs.traffic import RankTraffic
from hydra_dist.costs.ulysses import ulysses_traffic

MASKS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 9},
    "documents_by_row": {"documents": ((0, 13, 34), (0, 1, 50))},
    "documents_full": {"causal": False, "documents": ((0, 13, 34), (0, 5, 6, 7, 59))},
    "documents_window": {"window": 6, "documents": ((0, 30), (0, 8, 16, 24, 32, 40, 48))},
}
# (strategy, (ring, ulysses), ranks of an inner ring, what goes around in the backward pass)
RUNS = {
    "ring of 1": ("ring", (1, 1), None, "keys"),
    "ring of 2": ("ring", (2, 1), None, "keys"),
    "ring of 4": ("ring", (4, 1), None, "keys"),
    "ring of rings": ("ring", (4, 1), 2, "keys"),
    "queries": ("ring", (4, 1), None, "queries"),
    "queries in a ring of rings": ("ring", (6, 1), 3, "queries"),
    "all_gather": ("all_gather", (4, 1), None, None),
    "ulysses of 2": ("ulysses", (1, 2), None, None),
    "ulysses of 4": ("ulysses", (1, 4), None, None),
    "hybrid": ("hybrid", (2, 2), None, "keys"),
    "hybrid, queries": ("hybrid", (3, 2), None, "queries"),
    "hybrid, more ranks than key heads": ("hybrid", (2, 4), None, "keys"),
}


def closed_form(problem, layout, strategy, grid, inner, backward):
    """RankTraffic of every rank, those of a Ulysses group side by side."""
    ring, ulysses = grid
    dealing = chunks(layout, problem.sequence_length, ring, problem.documents)
    mask = MaskRule(problem.causal, problem.window, problem.documents)
    sizes = {"batch_size": problem.batch_size, "element_bytes": problem.dtype.itemsize}
    whole = Heads(problem.num_query_heads, problem.num_key_heads, problem.head_dim)
    mine = Heads(whole.query // ulysses, max(1, whole.key // ulysses), whole.dim)
    if strategy == "all_gather":
        along = gather_traffic(dealing, mask, mine, **sizes)
    else:
        along = ring_traffic(dealing, mask, mine, **sizes, inner=inner, backward=backward or "cheaper")
    return [
        RankTraffic(
            a.forward_bytes + b.forward_bytes,
            a.forward_messages + b.forward_messages,
            a.backward_bytes + b.backward_bytes,
            a.backward_messages + b.backward_messages,
        )
        for held, a in zip(dealing, along, strict=True)
        for b in ulysses_traffic(lengths(cut(held, ulysses)), whole, **sizes)
    ]


def counted(stats):
    return [
        RankTraffic(
            sent["forward"]["bytes"],
            sent["forward"]["messages"],
            sent["backward"]["bytes"],
            sent["backward"]["messages"],
        )
        for sent in stats
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("run", RUNS)
def test_bytes_and_messages_equal_the_closed_form(problem, over_ranks, run, mask, layout):
    strategy, grid, inner, rotates = RUNS[run]
    dtype = torch.bfloat16 if mask in ("window", "documents_full") else torch.float32
    case = problem(dtype=dtype, **MASKS[mask])
    _, stats = over_ranks(case, grid, layout, strategy=strategy, inner_ring=inner, rotates=rotates)
    assert counted(stats) == closed_form(case, layout, strategy, grid, inner, rotates)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
def test_the_ring_chooses_what_the_closed_form_calls_cheaper(problem, over_ranks, dtype, heads):
    case = problem(dtype=dtype, num_query_heads=heads[0], num_key_heads=heads[1], head_dim=16)
    _, stats = over_ranks(case, 4)
    assert counted(stats) == closed_form(case, "zigzag", "ring", (4, 1), None, None)
    moved = "queries" if dtype == torch.bfloat16 and heads == (4, 4) else "keys"
    assert set(stats[0]["backward"]["kinds"]) == {moved, {"keys": "key", "queries": "query"}[moved] + " gradients"}


def test_slices_of_heads_are_messages_of_their_own(problem, over_ranks, monkeypatch):
    monkeypatch.setattr(gather, "SMALLEST_SLICE", 1)
    case = problem(dtype=torch.float32)
    _, stats = over_ranks(case, 3, strategy="all_gather")
    found = counted(stats)
    assert found == closed_form(case, "zigzag", "all_gather", (3, 1), None, None)
    monkeypatch.undo()
    assert [2 * sent.forward_messages for sent in counted(over_ranks(case, 3, strategy="all_gather")[1])] == [
        sent.forward_messages for sent in found
    ]


@pytest.mark.parametrize("strategy,window", list(itertools.product(["ring", "all_gather"], [1, 2, 9, 16])))
def test_a_window_sends_the_rows_within_it(problem, over_ranks, strategy, window):
    case = problem(sequence_length=64, window=window, dtype=torch.float32)
    _, stats = over_ranks(case, 4, "contiguous", strategy=strategy)
    row = 2 * 2 * 2 * 8 * 4  # keys and values, 2 batch rows, 2 heads of 8, fp32
    assert [sent["forward"]["bytes"] for sent in stats] == [(window - 1) * row] * 3 + [0]
    assert [sent["forward"]["messages"] for sent in stats] == [int(window > 1)] * 3 + [0]


def test_the_closed_form_of_another_layout_mask_or_inner_ring_is_rejected(problem, over_ranks):
    case = problem(dtype=torch.float32, documents=((0, 8, 40),) * 2)
    found = counted(over_ranks(case, 4, "zigzag", inner_ring=2)[1])
    assert found == closed_form(case, "zigzag", "ring", (4, 1), 2, "keys")
    assert found != closed_form(case, "balanced", "ring", (4, 1), 2, "keys")
    assert found != closed_form(case, "zigzag", "ring", (4, 1), None, "keys")
    assert found != closed_form(problem(dtype=torch.float32), "zigzag", "ring", (4, 1), 2, "keys")
    assert found != closed_form(case, "zigzag", "ring", (4, 1), 2, "queries")
