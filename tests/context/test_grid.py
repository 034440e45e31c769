"""Every strategy x layout x mask x ranks x heads x lengths: output and gradients in fp64 as on one device.

What runs is a cover in which each two values that can meet do meet; ``-m full`` runs all combinations.
"""

import functools
import itertools
import random
from dataclasses import dataclass

import pytest

from hydra_dist.costs.layout import lengths, smallest_sequence
from hydra_dist.costs.ulysses import key_heads_per_rank
from hydra_dist.errors import ConfigError

STRATEGIES = (
    "ring",
    "ring of rings",
    "ring, queries",
    "ring of rings, queries",
    "all_gather",
    "ulysses",
    "hybrid, long ring",
    "hybrid, many heads",
)
LAYOUTS = ("contiguous", "zigzag", "striped", "balanced", "dealt")
MASKS = (
    "causal",
    "full",
    "window",
    "wide window",
    "documents",
    "documents by row",
    "documents, window",
    "documents, full",
)
RANKS = (1, 2, 3, 4, 8)
GROUPS = (1, 2, 4, 8)
LENGTHS = {
    "513/511": (513, 511),
    "257/255": (257, 255, 257, 255),
    "512/1/511": (512, 1, 511),
    "64/63": (64, 63) * 8,
    "67": (40, 1, 26),
}
"""Lengths of documents, and of the runs of rows that an explicit dealing gives to ranks in turn."""


@dataclass(frozen=True)
class Case:
    strategy: str
    layout: str
    mask: str
    ranks: int
    group: int
    lengths: str

    @property
    def values(self):
        return self.strategy, self.layout, self.mask, self.ranks, self.group, self.lengths

    @property
    def grid(self):
        """(ring, ulysses)"""
        if self.strategy == "ulysses":
            return 1, self.ranks
        if not self.strategy.startswith("hybrid"):
            return self.ranks, 1
        long_ring = self.strategy == "hybrid, long ring"
        ring = {4: 2, 8: 4}.get(self.ranks, self.ranks) if long_ring else {8: 2}.get(self.ranks, 1)
        return ring, self.ranks // ring

    @property
    def inner_ring(self):
        """Ranks of a node; 8 ranks are 2 nodes of 4, and where queries go around 4 nodes of 2."""
        return {
            "ring of rings": {1: 1, 2: 1, 3: 1, 4: 2, 8: 4},
            "ring of rings, queries": {1: 1, 2: 2, 3: 3, 4: 2, 8: 2},
        }.get(self.strategy, {}).get(self.ranks)

    @property
    def rotates(self):
        return "queries" if "queries" in self.strategy else "keys"

    @property
    def heads(self):
        """(query heads, key heads); 12 query heads for 3 ranks, so that Ulysses can deal them."""
        if self.group == 8:
            return 8, 1
        query = 12 if self.ranks == 3 else 8
        return query, query // self.group

    @property
    def sequence_length(self):
        return sum(LENGTHS[self.lengths])

    @property
    def dealing(self):
        return dealt(LENGTHS[self.lengths], self.grid[0]) if self.layout == "dealt" else None

    def problem(self, problem):
        S = self.sequence_length
        starts = tuple(itertools.accumulate(LENGTHS[self.lengths][:-1], initial=0))
        backwards = tuple(itertools.accumulate(LENGTHS[self.lengths][:0:-1], initial=0))
        settings = {
            "causal": {},
            "full": {"causal": False},
            "window": {"window": 9},
            "wide window": {"window": S * 5 // 8},
            "documents": {"documents": (starts,)},
            "documents by row": {"documents": (starts, backwards)},
            "documents, window": {"documents": (backwards,), "window": S // 10},
            "documents, full": {"documents": (starts, (0,)), "causal": False},
        }[self.mask]
        query, key = self.heads
        return problem(S, len(settings.get("documents", "1")), query, key, head_dim=8, **settings)


@functools.cache
def dealt(runs, num_ranks):
    """The runs of rows to the ranks in turn; where there are too few, the longest is cut into two that differ by one or
    two rows."""
    runs = list(runs)
    while len(runs) < num_ranks:
        longest = runs.index(max(runs))
        rows = runs[longest]
        runs[longest : longest + 1] = [rows // 2 + 1, rows - rows // 2 - 1]
    edges = [0, *itertools.accumulate(runs)]
    pieces = [range(start, stop) for start, stop in itertools.pairwise(edges)]
    return [pieces[rank::num_ranks] for rank in range(num_ranks)]


def is_possible(case):
    """Whether the heads can be dealt to the ranks of a Ulysses group, and the rows to all ranks."""
    ring, num_parts = case.grid
    try:
        key_heads_per_rank(*case.heads, num_parts)
    except ConfigError:
        return False
    if case.sequence_length < smallest_sequence(case.layout, ring):
        return False
    dealing = case.dealing
    return dealing is None or min(lengths(dealing)) >= num_parts


@functools.cache
def everything():
    dimensions = (STRATEGIES, LAYOUTS, MASKS, RANKS, GROUPS, LENGTHS)
    return [case for case in itertools.starmap(Case, itertools.product(*dimensions)) if is_possible(case)]


def pairs_of(case):
    return list(itertools.combinations(enumerate(case.values), 2))


@functools.cache
def cover():
    """Cases in which each pair of values of two dimensions occurs that occurs in any. Greedy, among a sample."""
    generator = random.Random(0)
    having = {}
    for case in everything():
        for pair in pairs_of(case):
            having.setdefault(pair, []).append(case)
    missing, found = dict.fromkeys(having), []
    while missing:
        cases = having[next(iter(missing))]
        candidates = generator.sample(cases, min(64, len(cases)))
        best = max(candidates, key=lambda case: sum(pair in missing for pair in pairs_of(case)))
        found.append(best)
        for pair in pairs_of(best):
            missing.pop(pair, None)
    return found


@functools.lru_cache(maxsize=8)
def remembered(whole, problem):
    return whole(problem)


def largest_error(case, problem, whole, over_ranks, errors):
    one = case.problem(problem)
    found, _ = over_ranks(
        one,
        case.grid,
        "zigzag" if case.layout == "dealt" else case.layout,
        strategy=case.strategy.split(",")[0].split(" ")[0],
        inner_ring=case.inner_ring,
        rotates=case.rotates,
        dealing=case.dealing,
    )
    return max(errors(found, remembered(whole, one)))


def test_the_cover_has_every_pair_that_can_be():
    values = (STRATEGIES, LAYOUTS, MASKS, RANKS, GROUPS, LENGTHS)
    possible = {pair for case in everything() for pair in pairs_of(case)}
    assert {pair for case in cover() for pair in pairs_of(case)} == possible
    assert len(cover()) < 2 * len(STRATEGIES) * len(MASKS)
    # What cannot be are some triples, as 3 ranks of a Ulysses group with one key head for 8 query heads, but no pair.
    assert len(possible) == sum(len(a) * len(b) for a, b in itertools.combinations(values, 2))


@pytest.mark.parametrize("case", cover(), ids=lambda case: "-".join(map(str, case.values)))
def test_output_and_gradients_equal_one_device(case, problem, whole, over_ranks, errors):
    assert largest_error(case, problem, whole, over_ranks, errors) < 1e-12


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_combinations(strategy, ranks, layout, problem, whole, over_ranks, errors):
    cases = [case for case in everything() if (case.strategy, case.ranks, case.layout) == (strategy, ranks, layout)]
    wrong = [case for case in cases if not largest_error(case, problem, whole, over_ranks, errors) < 1e-12]
    assert not wrong
