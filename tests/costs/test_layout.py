"""Layouts, halo sources and the ring's traffic, against what a plain loop over positions says."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_dist.costs.layout import (
    LAYOUTS,
    Journey,
    chunks,
    halo_sources,
    halo_traffic,
    lengths,
    ring_journeys,
    ring_traffic,
)
from hydra_dist.errors import ConfigError


@st.composite
def dealt(draw):
    """(layout, S, P) that fit together."""
    num_ranks = draw(st.integers(1, 9))
    return draw(st.sampled_from(LAYOUTS)), draw(st.integers(2 * num_ranks, 70)), num_ranks


def positions_of(held):
    return [position for start, stop in held for position in range(start, stop)]


@given(dealt())
def test_every_position_has_one_owner_and_shards_differ_by_two_rows_at_most(case):
    dealing = chunks(*case)
    assert sorted(position for held in dealing for position in positions_of(held)) == list(range(case[1]))
    assert all(held == sorted(held) and all(start < stop for start, stop in held) for held in dealing)
    assert lengths(dealing) == [len(positions_of(held)) for held in dealing]
    assert max(lengths(dealing)) - min(lengths(dealing)) <= 2


def test_zigzag_pairs_early_pieces_with_late_ones():
    assert chunks("zigzag", 16, 4) == [[(0, 2), (14, 16)], [(2, 4), (12, 14)], [(4, 6), (10, 12)], [(6, 10)]]
    assert chunks("zigzag", 13, 2) == [[(0, 3), (9, 13)], [(3, 9)]]
    assert chunks("contiguous", 13, 3) == [[(0, 4)], [(4, 8)], [(8, 13)]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_rank_has_one_chunk(layout):
    assert chunks(layout, 1, 1) == [[(0, 1)]]
    assert chunks(layout, 7, 1) == [[(0, 7)]]


def test_zigzag_balances_a_causal_mask_and_contiguous_does_not():
    def pairs(layout):
        return [sum(position + 1 for position in positions_of(held)) for held in chunks(layout, 1024, 8)]

    assert max(pairs("zigzag")) == min(pairs("zigzag"))
    assert max(pairs("contiguous")) > 10 * min(pairs("contiguous"))


def test_an_unknown_layout_names_the_closest():
    with pytest.raises(ConfigError, match=r'zigzg \(did you mean "zigzag"\?\); zigzag and contiguous exist'):
        chunks("zigzg", 8, 2)


@pytest.mark.parametrize("case", [("zigzag", 7, 4), ("contiguous", 3, 4), ("zigzag", 1, 3)])
def test_a_sequence_shorter_than_the_pieces_is_refused_and_the_suggestions_work(case):
    layout, sequence_length, num_ranks = case
    with pytest.raises(ConfigError) as caught:
        chunks(layout, sequence_length, num_ranks)
    words = str(caught.value).split("; ")[-1].replace(",", "").split()
    chunks(layout, int(words[words.index("sequence") + 2]), num_ranks)
    chunks(layout, sequence_length, int(words[words.index("context.size") + 1]))


def test_no_ranks_are_refused():
    with pytest.raises(ConfigError, match="at least 1 rank"):
        chunks("zigzag", 8, 0)


@given(dealt(), st.integers(0, 12))
def test_halo_sources_name_the_owner_of_every_position(case, rows):
    dealing = chunks(*case)
    owner_of = {p: (rank, row) for rank, held in enumerate(dealing) for row, p in enumerate(positions_of(held))}
    for rank, runs in enumerate(halo_sources(dealing, rows)):
        found = {(run.chunk, run.slot + i): (run.owner, run.row + i) for run in runs for i in range(run.length)}
        wanted = {
            (chunk, slot): owner_of[start - rows + slot]
            for chunk, (start, _) in enumerate(dealing[rank])
            for slot in range(rows)
            if start - rows + slot >= 0
        }
        assert found == wanted
        assert sum(run.length for run in runs) == len(wanted)


def test_a_halo_wider_than_a_chunk_reaches_over_several_ranks_and_back_to_its_own():
    dealing = chunks("zigzag", 8, 2)  # rank 0: 0 1 6 7, rank 1: 2 3 4 5
    owners = [(run.slot, run.length, run.owner, run.row) for run in halo_sources(dealing, 6)[0] if run.chunk == 1]
    assert owners == [(0, 2, 0, 0), (2, 4, 1, 0)]


@st.composite
def documents(draw, sequence_length):
    rows = draw(st.integers(1, 3))
    starts = st.sets(st.integers(1, sequence_length - 1), max_size=6) if sequence_length > 1 else st.just(set())
    return [sorted({0} | draw(starts)) for _ in range(rows)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_journeys_go_as_far_as_a_plain_look_at_the_mask_says(data):
    _, sequence_length, num_ranks = case = data.draw(dealt())
    causal, window = data.draw(st.booleans()), data.draw(st.none() | st.integers(1, sequence_length + 3))
    starts = data.draw(st.none() | documents(sequence_length))
    dealing = chunks(*case)

    def sees(q, k):
        if (causal or window is not None) and k > q:
            return False
        if window is not None and q - k >= window:
            return False
        return starts is None or any(max(s for s in row if s <= q) == max(s for s in row if s <= k) for row in starts)

    held = [positions_of(own) for own in dealing]
    journeys = ring_journeys(dealing, causal=causal, window=window, documents=starts)
    for owner, journey in enumerate(journeys):
        needing = [
            hop
            for hop in range(1, num_ranks)
            if any(sees(q, k) for q in held[(owner + hop) % num_ranks] for k in held[owner])
        ]
        assert journey == (Journey(needing[0], needing[-1]) if needing else Journey(0, 0))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_closed_form_of_a_ring_in_which_all_keys_go_all_the_way(num_ranks):
    dealing = chunks("zigzag", 101, num_ranks)
    journeys = ring_journeys(dealing, causal=True)
    held = lengths(dealing)
    row = 2 * 3 * 5 * 16  # keys and values, batch 3, 5 heads of 16
    traffic = ring_traffic(dealing, journeys, batch_size=3, num_key_heads=5, head_dim=16, element_bytes=2)
    for rank, sent in enumerate(traffic):
        following = held[(rank + 1) % num_ranks]  # the next rank's keys end their way here
        own = held[rank]
        assert sent.forward_bytes == (101 - following) * row * 2
        assert sent.backward_bytes == (101 - following) * row * 2 + (101 - own) * row * 4
        assert (sent.forward_messages, sent.backward_messages) == (num_ranks - 1, 2 * (num_ranks - 1))


def test_a_contiguous_causal_ring_sends_keys_to_later_ranks_only():
    dealing = chunks("contiguous", 64, 4)
    journeys = ring_journeys(dealing, causal=True)
    assert journeys == (Journey(1, 3), Journey(1, 2), Journey(1, 1), Journey(0, 0))
    traffic = ring_traffic(dealing, journeys, batch_size=1, num_key_heads=1, head_dim=1, element_bytes=1)
    assert [sent.forward_bytes for sent in traffic] == [32, 64, 96, 0]
    assert [sent.backward_messages - sent.forward_messages for sent in traffic] == [0, 1, 2, 3]


def test_a_window_within_a_chunk_needs_the_neighbour_only():
    dealing = chunks("contiguous", 64, 4)
    assert ring_journeys(dealing, causal=True, window=17)[0] == Journey(1, 1)
    assert ring_journeys(dealing, causal=True, window=18)[0] == Journey(1, 2)
    assert ring_journeys(dealing, causal=True, window=1)[0] == Journey(0, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_closed_form_of_the_halo(layout):
    dealing = chunks(layout, 800, 4)
    traffic = halo_traffic(dealing, [(2, 10), (1, 6)], batch_size=3)
    one = (2 * 10 + 1 * 6) * 3
    # Contiguous: the last rank has no successor. Zigzag: rank 0's last row ends the sequence; the two pieces of rank 3
    # are one chunk, whose ends both have neighbours on rank 2 only.
    messages = [1, 1, 1, 0] if layout == "contiguous" else [1, 2, 2, 1]
    assert [sent.forward_messages for sent in traffic] == messages
    assert [sent.forward_bytes for sent in traffic] == [one * count for count in messages]
    assert sum(sent.backward_bytes for sent in traffic) == sum(sent.forward_bytes for sent in traffic)
    assert halo_traffic(chunks(layout, 800, 1), [(2, 10)], batch_size=3)[0].forward_bytes == 0
