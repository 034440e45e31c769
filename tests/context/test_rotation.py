"""Rows that go around a ring, the sums that follow them, and wrong ways around that comparisons reject."""

import dataclasses

import pytest
import torch

from hydra_dist.context import ContextParallel, run_ranks
from hydra_dist.context.geometry import Geometry
from hydra_dist.context.rotation import Followers, Visitors, add_to_rows, rows_of
from hydra_dist.context.schedules import Schedules
from hydra_dist.costs.layout import chunks
from hydra_dist.costs.needs import MaskRule
from hydra_dist.costs.tiles import Span

LENGTH = 48
RINGS = [(1, None), (2, None), (3, None), (4, None), (4, 2), (6, 3), (6, 2), (8, 4)]


def shape(rows):
    return (rows,), torch.float64


def shapes(rows):
    return [shape(rows)]


@pytest.mark.parametrize("ranks,inner", RINGS)
@pytest.mark.parametrize("side", ["keys", "queries"])
@pytest.mark.parametrize("mask", [MaskRule(True), MaskRule(False), MaskRule(True, 9), MaskRule(True, None, [[0, 11]])])
def test_wanted_rows_visit_and_their_sums_come_home(ranks, inner, side, mask):
    def one_rank(mesh):
        geometry = Geometry(chunks("zigzag", LENGTH, ranks), mesh.rank)
        schedule = geometry.schedule(mask, side, inner)
        positions = geometry.positions(mesh.device).double()
        mine = schedule.journeys[mesh.rank].rows
        total = torch.zeros_like(positions)
        visits = Visitors(mesh.ring, schedule, shapes, "backward", "rows")
        follow = Followers(mesh.ring, schedule, shape, "sums", lambda rows, came: add_to_rows(total, rows, came, 0))
        for hop, visitor in visits([rows_of(positions, mine, 0)] if mine else []):
            owner = schedule.path.owner(mesh.rank, hop)
            journey = schedule.journeys[owner]
            if hop == 0:
                assert visitor is None
                continue
            assert (visitor is not None) == (journey.last >= hop)
            added = None
            if visitor is not None:
                held = [position for chunk in geometry.dealing[owner] for position in chunk]
                assert visitor[0].tolist() == [held[row] for part in journey.rows for row in part]
                if schedule.tiles[hop]:
                    added = follow.zeros(hop)
                    added += 1000 * (mesh.rank + 1) + visitor[0]
            follow.pass_on(hop, added)
        follow.finish()
        return geometry, schedule, total

    results = run_ranks(ranks, one_rank, timeout=20)
    for owner, (geometry, schedule, total) in enumerate(results):
        path, journey = schedule.path, schedule.journeys[owner]
        visited = [path.visited(owner, hop) for hop in range(1, ranks)]
        adding = [rank for hop, rank in enumerate(visited, start=1) if results[rank][1].tiles[hop]]
        wanted = torch.zeros_like(total)
        for part in journey.rows:
            positions = geometry.positions(torch.device("cpu"))[part.start : part.stop].double()
            wanted[part.start : part.stop] = sum(1000 * (rank + 1) + positions for rank in adding)
        assert torch.equal(total, wanted)
        assert bool(adding) == bool(journey.rows)


def test_rows_are_a_view_where_they_are_one_range():
    x = torch.arange(24.0).view(2, 12)
    one = rows_of(x, (range(3, 7),), 1)
    assert one.data_ptr() == x[:, 3].data_ptr()
    several = rows_of(x, (range(0, 2), range(5, 6)), 1)
    assert several.tolist() == x[:, [0, 1, 5]].tolist()
    total = torch.zeros(2, 12)
    add_to_rows(total, (range(0, 2), range(5, 6)), several, 1)
    assert total.tolist() == (x * torch.tensor([1.0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0])).tolist()


def test_schedules_without_documents_are_kept_and_others_are_not():
    context = ContextParallel()
    geometry = Geometry(chunks("zigzag", LENGTH, 2), 0)
    first, second = Schedules(geometry, None, None), Schedules(geometry, None, None)
    assert first.ring(True, None, "keys") is second.ring(True, None, "keys")
    assert first.ring(True, None, "keys") is not first.ring(True, None, "queries")
    assert first.ring(True, 5, "keys") is not first.ring(True, None, "keys")
    assert first.gathering(True, None) is second.gathering(True, None)
    packed = Schedules(geometry, ((0, 7),), None), Schedules(geometry, ((0, 9),), None)
    assert packed[0].ring(True, None, "keys") != packed[1].ring(True, None, "keys")
    assert context.plan(LENGTH).geometry is context.plan(LENGTH).geometry


WRONG = {
    "tiles of another ring": {"inner_ring": 2},
    "tiles of one hop later": {},
    "tiles of the other way round": {"rotates": "queries"},
}


@pytest.mark.parametrize("name", WRONG)
def test_the_comparison_rejects_a_path_that_is_off(problem, whole, over_ranks, errors, monkeypatch, name):
    case = problem(sequence_length=64)
    assert max(errors(over_ranks(case, 4, **WRONG[name])[0], whole(case))) < 1e-12
    right = Geometry.schedule

    def wrong(self, mask, side, inner):
        found = right(self, mask, side, inner)
        tiles = found.tiles
        if name == "tiles of another ring":
            tiles = right(self, mask, side, None).tiles
        elif name == "tiles of one hop later":
            tiles = (tiles[0], *tiles[2:], tiles[1])
        elif side == "queries":
            tiles = (tiles[0], *tiles[:0:-1])
        return dataclasses.replace(found, tiles=tiles)

    monkeypatch.setattr(Geometry, "schedule", wrong)
    assert max(errors(over_ranks(case, 4, **WRONG[name])[0], whole(case))) > 1e-2


@pytest.mark.parametrize("strategy,stride", [("ring", 1), ("ring", 4), ("all_gather", 4)])
def test_the_comparison_rejects_striped_rows_read_as_others(
    problem, whole, over_ranks, errors, monkeypatch, strategy, stride
):
    """As one run of positions (all queries and keys of a hop then look like a square), or as those of rank 0."""
    case = problem(sequence_length=64)
    right = Geometry.spans
    assert max(errors(over_ranks(case, 4, "striped", strategy=strategy)[0], whole(case))) < 1e-12

    def others(self, rank, rows=None):
        return [Span(span.row_start, span.row_stop, 0, stride) for span in right(self, rank, rows)]

    monkeypatch.setattr(Geometry, "spans", others)
    assert max(errors(over_ranks(case, 4, "striped", strategy=strategy)[0], whole(case))) > 1e-2


@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
@pytest.mark.parametrize("wrong", [None, ((0, 20, 40),) * 2])
def test_the_comparison_rejects_balanced_with_wrong_documents(
    problem, whole, over_ranks, errors, monkeypatch, strategy, wrong
):
    case = problem(sequence_length=64, documents=((0, 13, 34), (0, 1, 50)))
    assert max(errors(over_ranks(case, 4, "balanced", strategy=strategy)[0], whole(case))) < 1e-12
    monkeypatch.setattr(Schedules, "_mask", lambda self, causal, window: MaskRule(causal, window, wrong))
    assert max(errors(over_ranks(case, 4, "balanced", strategy=strategy)[0], whole(case))) > 1e-2
