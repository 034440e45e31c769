"""Paths around rings, journeys of rows, and what they move."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_dist.costs.layout import chunks, lengths
from hydra_dist.costs.needs import MaskRule, wanted_rows
from hydra_dist.costs.rotation import (
    Heads,
    Journey,
    RingPath,
    cheaper_backward,
    journeys,
    ring_traffic,
    travelling_bytes,
)
from hydra_dist.errors import ConfigError

PATHS = [
    (ranks, inner, reverse)
    for ranks in (1, 2, 3, 4, 6, 8, 12, 16)
    for inner in (None, *range(1, ranks + 1))
    if inner is None or ranks % inner == 0
    for reverse in (False, True)
]


@pytest.mark.parametrize("ranks,inner,reverse", PATHS)
def test_paths_visit_every_rank_once_and_owner_inverts_visited(ranks, inner, reverse):
    path = RingPath(ranks, inner, reverse)
    for rank in range(ranks):
        assert path.visited(rank, 0) == rank == path.owner(rank, 0)
        assert sorted(path.visited(rank, hop) for hop in range(ranks)) == list(range(ranks))
        assert all(path.owner(path.visited(rank, hop), hop) == rank for hop in range(ranks))
    for hop in range(1, ranks):
        # Each rank passes on what it has to one other rank, and all have something else.
        moves = {path.visited(owner, hop - 1): path.visited(owner, hop) for owner in range(ranks)}
        assert sorted(moves) == sorted(moves.values()) == list(range(ranks))
        assert all(source != destination for source, destination in moves.items())


@pytest.mark.parametrize("ranks,inner,reverse", PATHS)
def test_rows_leave_a_node_only_when_all_of_it_has_seen_them(ranks, inner, reverse):
    path = RingPath(ranks, inner, reverse)
    width = inner or ranks
    for owner in range(ranks):
        nodes = [path.visited(owner, hop) // width for hop in range(ranks)]
        assert [len(list(group)) for _, group in itertools.groupby(nodes)] == [width] * (ranks // width)
        # To the next node all ranks of one go at once, each to the rank in its own place.
        for before, after in itertools.pairwise(path.visited(owner, hop) for hop in range(ranks)):
            assert before // width == after // width or before % width == after % width


def test_the_two_ways_of_one_ring_and_of_a_ring_of_rings():
    assert [RingPath(4).visited(1, hop) for hop in range(4)] == [1, 2, 3, 0]
    assert [RingPath(4, reverse=True).visited(1, hop) for hop in range(4)] == [1, 0, 3, 2]
    assert [RingPath(6, 3).visited(1, hop) for hop in range(6)] == [1, 2, 0, 3, 4, 5]
    assert [RingPath(6, 2).visited(0, hop) for hop in range(6)] == [0, 1, 3, 2, 4, 5]


@pytest.mark.parametrize("inner", [0, 3, 16])
def test_an_inner_ring_that_does_not_divide_is_refused(inner):
    with pytest.raises(ConfigError, match=rf"context\.inner_ring {inner} does not divide the 8 .*; 1 or 2 or 4 or 8"):
        RingPath(8, inner)


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_journeys_go_as_far_as_a_plain_look_at_the_mask_says(dealings, masks, sees, positions_of, data):
    sequence_length, dealing, documents = data.draw(dealings())
    causal, window = data.draw(masks(sequence_length))
    ranks = len(dealing)
    inner = data.draw(st.sampled_from([None, *(size for size in range(1, ranks + 1) if ranks % size == 0)]))
    side, reverse = data.draw(st.sampled_from(["keys", "queries"])), data.draw(st.booleans())
    path = RingPath(ranks, inner, reverse)
    held = [positions_of(own) for own in dealing]
    striped = any(chunk.step > 1 for own in dealing for chunk in own)
    for owner, journey in enumerate(journeys(dealing, MaskRule(causal, window, documents), path, side)):

        def pair(mine, other):
            q, k = (other, mine) if side == "keys" else (mine, other)
            return sees(q, k, causal, window, documents)

        wanted = [
            {row for row, mine in enumerate(held[owner]) if any(pair(mine, other) for other in held[rank])}
            for rank in (path.visited(owner, hop) for hop in range(1, ranks))
        ]
        hops = [hop for hop, rows in enumerate(wanted, start=1) if rows]
        rows = sorted(set().union(*wanted)) if not striped or not hops else list(range(len(held[owner])))
        assert [row for part in journey.rows for row in part] == rows
        assert (journey.first, journey.last) == ((hops[0], hops[-1]) if hops else (0, 0))
        assert journey.num_rows == len(rows)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_closed_form_of_a_ring_in_which_all_keys_go_all_the_way(num_ranks):
    # Under a full mask every rank wants all keys.
    dealing = chunks("zigzag", 101, num_ranks)
    held = lengths(dealing)
    row = 2 * 3 * 5 * 16  # keys and values, batch 3, 5 heads of 16
    heads = Heads(15, 5, 16)
    traffic = ring_traffic(dealing, MaskRule(False), heads, batch_size=3, element_bytes=2, backward="keys")
    for rank, sent in enumerate(traffic):
        following = held[(rank + 1) % num_ranks]  # the next rank's keys end their way here
        own = held[rank]
        assert sent.forward_bytes == (101 - following) * row * 2
        assert sent.backward_bytes == (101 - following) * row * 2 + (101 - own) * row * 4
        assert (sent.forward_messages, sent.backward_messages) == (num_ranks - 1, 2 * (num_ranks - 1))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("element_bytes,wide_bytes", [(2, 4), (4, 4), (8, 8)])
def test_closed_form_of_a_ring_in_which_all_queries_go_all_the_way(num_ranks, element_bytes, wide_bytes):
    dealing = chunks("contiguous", 101, num_ranks)
    held = lengths(dealing)
    traffic = ring_traffic(
        dealing, MaskRule(False), Heads(6, 3, 16), batch_size=3, element_bytes=element_bytes, backward="queries"
    )
    there = 3 * 6 * (3 * 16 * element_bytes + wide_bytes)  # the output's gradient, q, the output; lse
    back = 3 * 6 * 16 * wide_bytes
    for rank, sent in enumerate(traffic):
        before = held[(rank - 1) % num_ranks]  # queries go the other way round
        assert sent.backward_bytes == (101 - before) * there + (101 - held[rank]) * back
        assert (sent.forward_messages, sent.backward_messages) == (num_ranks - 1, 3 * (num_ranks - 1))


def test_queries_go_around_where_they_are_fewer_bytes():
    # Bytes a row and head dimension: keys 2 Hk (b + w), queries Hq (3 b + w) + Hq w / D for lse.
    assert cheaper_backward(Heads(4, 4, 64), 2) == "queries"  # 4 * 10 + 4 * 4 / 64 < 8 * 6
    assert cheaper_backward(Heads(4, 4, 64), 4) == "keys"  # 4 * 16 + ... > 8 * 8
    assert cheaper_backward(Heads(8, 4, 64), 2) == "keys"
    assert cheaper_backward(Heads(4, 4, 2), 2) == "keys"  # 4 * 10 + 4 * 4 / 2 = 8 * 6: no difference
    assert travelling_bytes("keys", Heads(8, 2, 16), 2) == (128, 256)
    assert travelling_bytes("queries", Heads(8, 2, 16), 2) == (8 * (96 + 4), 512)


@pytest.mark.parametrize("heads", [Heads(4, 4, 64), Heads(8, 2, 64)])
def test_cheaper_is_the_side_that_sends_less_under_a_full_mask(heads):
    dealing = chunks("zigzag", 128, 4)

    def sent(side):
        traffic = ring_traffic(dealing, MaskRule(False), heads, batch_size=1, element_bytes=2, backward=side)
        return sum(rank.backward_bytes for rank in traffic)

    assert sent("cheaper") == min(sent("keys"), sent("queries")) < max(sent("keys"), sent("queries"))


def test_a_contiguous_causal_ring_sends_keys_to_later_ranks_only():
    dealing = chunks("contiguous", 64, 4)
    whole = (range(16),)
    found = journeys(dealing, MaskRule(True), RingPath(4), "keys")
    assert found == (Journey(whole, 1, 3), Journey(whole, 1, 2), Journey(whole, 1, 1), Journey((), 0, 0))
    heads = Heads(1, 1, 1)
    traffic = ring_traffic(dealing, MaskRule(True), heads, batch_size=1, element_bytes=1, backward="keys")
    assert [sent.forward_bytes for sent in traffic] == [32, 64, 96, 0]
    assert [sent.backward_messages - sent.forward_messages for sent in traffic] == [0, 1, 2, 3]
    # Queries go the other way round, to earlier ranks.
    found = journeys(dealing, MaskRule(True), RingPath(4, reverse=True), "queries")
    assert found == (Journey((), 0, 0), Journey(whole, 1, 1), Journey(whole, 1, 2), Journey(whole, 1, 3))


def test_a_window_within_a_chunk_needs_the_neighbour_only():
    dealing = chunks("contiguous", 64, 4)

    def first(window):
        return journeys(dealing, MaskRule(True, window), RingPath(4), "keys")[0]

    assert first(17) == Journey((range(16),), 1, 1)
    assert first(18) == Journey((range(16),), 1, 2)
    assert first(5) == Journey((range(12, 16),), 1, 1)
    assert first(1) == Journey((), 0, 0)


@pytest.mark.parametrize("window", [2, 9, 16])
def test_a_window_sends_the_rows_within_it(window):
    dealing = chunks("contiguous", 64, 4)
    traffic = ring_traffic(dealing, MaskRule(True, window), Heads(1, 1, 1), batch_size=1, element_bytes=1)
    assert [sent.forward_bytes for sent in traffic] == [2 * (window - 1)] * 3 + [0]


def test_the_rows_that_travel_are_the_wanted_ones_of_all_ranks():
    # Rank 0's keys: its neighbour wants the last 2 for their documents, and rank 3 wants none.
    dealing = chunks("contiguous", 64, 4)
    mask = MaskRule(True, None, [[0, 14, 40]])
    found = journeys(dealing, mask, RingPath(4), "keys")
    assert found[0] == Journey((range(14, 16),), 1, 2)
    assert found[1] == Journey((range(16),), 1, 1)
    assert found[2] == Journey((range(8, 16),), 1, 1)
    for owner, journey in enumerate(found):
        others = [reader for reader in range(4) if reader != owner]
        wanted = [part for reader in others for part in wanted_rows(dealing, owner, reader, "keys", mask)]
        everywhere = {row for part in wanted for row in part}
        assert everywhere == {row for part in journey.rows for row in part}
