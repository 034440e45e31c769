"""The rows before each chunk, against what a plain loop over positions says."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_dist.costs.halo import halo_sources, halo_traffic, has_halo
from hydra_dist.costs.layout import chunks


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_halo_sources_name_the_owner_of_every_position(dealings, positions_of, data):
    _, dealing, _ = data.draw(dealings(striped=False))
    rows = data.draw(st.integers(0, 12))
    owner_of = {p: (rank, row) for rank, held in enumerate(dealing) for row, p in enumerate(positions_of(held))}
    for rank, runs in enumerate(halo_sources(dealing, rows)):
        found = {(run.chunk, run.slot + i): (run.owner, run.row + i) for run in runs for i in range(run.length)}
        wanted = {
            (index, slot): owner_of[chunk.start - rows + slot]
            for index, chunk in enumerate(dealing[rank])
            for slot in range(rows)
            if chunk.start - rows + slot >= 0
        }
        assert found == wanted
        assert sum(run.length for run in runs) == len(wanted)


def test_a_halo_wider_than_a_chunk_reaches_over_several_ranks_and_back_to_its_own():
    dealing = chunks("zigzag", 8, 2)  # rank 0: 0 1 6 7, rank 1: 2 3 4 5
    owners = [(run.slot, run.length, run.owner, run.row) for run in halo_sources(dealing, 6)[0] if run.chunk == 1]
    assert owners == [(0, 2, 0, 0), (2, 4, 1, 0)]


def test_striped_rows_have_no_halo():
    dealing = chunks("striped", 12, 3)
    assert not any(map(has_halo, dealing))
    assert all(map(has_halo, chunks("balanced", 12, 3)))
    with pytest.raises(ValueError, match="striped rows have no halo"):
        halo_sources(dealing, 1)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
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


def test_shards_shorter_than_the_halo_send_to_more_than_one_rank():
    dealing = [[range(512)], [range(512, 513)], [range(513, 1024)]]
    traffic = halo_traffic(dealing, [(3, 10)], batch_size=1)
    # Rank 2 wants positions 510, 511 of rank 0 and 512 of rank 1; rank 1 wants 509 .. 511.
    assert [(sent.forward_messages, sent.forward_bytes) for sent in traffic] == [(2, 50), (1, 10), (0, 0)]
    assert [(sent.backward_messages, sent.backward_bytes) for sent in traffic] == [(0, 0), (1, 30), (2, 30)]
