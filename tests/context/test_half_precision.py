"""bf16 over many ranks loses no more than bf16 on one device, for every strategy."""

import pytest
import torch

from hydra_dist.attention import LARGEST_LOGIT_BOUND
from hydra_dist.context.rotation import Followers

# (strategy, (ring, ulysses), ranks of an inner ring, what goes around in the backward pass)
RUNS = [
    *(("ring", (ranks, 1), None, rotates) for ranks in (2, 4, 8, 16) for rotates in ("keys", "queries")),
    ("ring", (8, 1), 4, "keys"),
    ("ring", (16, 1), 4, "queries"),
    *(("all_gather", (ranks, 1), None, None) for ranks in (2, 4, 8, 16)),
    *(("ulysses", (1, ranks), None, None) for ranks in (2, 4)),
    ("hybrid", (2, 2), None, "keys"),
    ("hybrid", (4, 2), None, "queries"),
    ("hybrid", (2, 4), None, "keys"),
    ("hybrid", (8, 2), None, "keys"),
    ("hybrid", (4, 4), None, "keys"),
]
SEEDS = 5


def squares(found, exact):
    return torch.stack([((a.double() - b) ** 2).mean() for a, b in zip(found, exact, strict=True)])


@pytest.fixture(scope="module")
def kept():
    return {}


@pytest.fixture
def single(problem, whole, kept):
    """For each key heads: problems, exact results, and the squared error of one device's bf16 kernel."""

    def make(num_key_heads):
        if num_key_heads not in kept:
            cases = [
                problem(256, 1, 16, num_key_heads, head_dim=16, dtype=torch.bfloat16, seed=seed)
                for seed in range(SEEDS)
            ]
            exact = [whole(case, dtype=torch.float64) for case in cases]
            alone = sum(squares(whole(case, backend="auto"), x) for case, x in zip(cases, exact, strict=True))
            kept[num_key_heads] = cases, exact, alone
        return kept[num_key_heads]

    return make


def ratio(over_ranks, single, num_key_heads, strategy, grid, inner, rotates, logit_bound=None):
    """The rms error of output and gradients over that of one device, each against fp64."""
    cases, exact, alone = single(num_key_heads)
    settings = {"strategy": strategy, "inner_ring": inner, "rotates": rotates, "logit_bound": logit_bound}
    ours = sum(squares(over_ranks(case, grid, **settings)[0], x) for case, x in zip(cases, exact, strict=True))
    return (ours / alone).sqrt().max()


@pytest.mark.parametrize("strategy,grid,inner,rotates", RUNS)
def test_ranks_lose_no_more_than_one_device(over_ranks, single, strategy, grid, inner, rotates):
    assert ratio(over_ranks, single, 4, strategy, grid, inner, rotates) <= 1.15


@pytest.mark.parametrize("strategy,grid", [("ulysses", (1, 8)), ("ulysses", (1, 16)), ("hybrid", (2, 8))])
def test_nor_where_several_ranks_share_key_heads(over_ranks, single, strategy, grid):
    assert ratio(over_ranks, single, 4, strategy, grid, None, None) <= 1.15


@pytest.mark.parametrize("strategy,grid", [("ring", (16, 1)), ("all_gather", (16, 1)), ("hybrid", (4, 4))])
def test_nor_where_parts_are_added_plainly(over_ranks, single, strategy, grid):
    assert ratio(over_ranks, single, 4, strategy, grid, None, None, LARGEST_LOGIT_BOUND) <= 1.15


def test_the_comparison_rejects_sums_over_ranks_in_bf16(over_ranks, single, monkeypatch):
    pass_on = Followers.pass_on

    def rounded(self, hop, added):
        pass_on(self, hop, None if added is None else added.copy_(added.bfloat16()))

    monkeypatch.setattr(Followers, "pass_on", rounded)
    for rotates in ("keys", "queries"):
        assert ratio(over_ranks, single, 4, "ring", (8, 1), None, rotates) > 1.15
