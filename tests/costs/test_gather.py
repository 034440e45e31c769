"""Who sends which keys to whom, against the mask's definition, and what that moves."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_dist.costs import gather
from hydra_dist.costs.gather import gather_traffic, heads_of_slices, shares
from hydra_dist.costs.layout import chunks
from hydra_dist.costs.needs import MaskRule
from hydra_dist.costs.rotation import Heads, ring_traffic


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_shares_are_the_keys_that_a_reader_sees(dealings, masks, sees, positions_of, data):
    sequence_length, dealing, documents = data.draw(dealings())
    causal, window = data.draw(masks(sequence_length))
    striped = any(chunk.step > 1 for own in dealing for chunk in own)
    for owner, held in enumerate(dealing):
        local = positions_of(held)
        for reader, other in enumerate(dealing):
            found = shares(dealing, owner, reader, MaskRule(causal, window, documents))
            for share in found:
                assert share.owner == owner
                rows = local[share.row : share.row + len(share.positions)]
                assert rows == list(share.positions)
            taken = [position for share in found for position in share.positions]
            readers = positions_of(other)
            wanted = [k for k in local if any(sees(q, k, causal, window, documents) for q in readers)]
            if owner == reader or (striped and wanted):
                wanted = local
            assert taken == wanted


@given(st.integers(1, 40), st.integers(1, 1 << 24))
def test_slices_have_every_head_once_and_no_more_than_make_the_smallest_slice(num_key_heads, whole_head_bytes):
    parts = heads_of_slices(num_key_heads, whole_head_bytes)
    assert [head for part in parts for head in part] == list(range(num_key_heads))
    width = len(parts[0])
    assert all(len(part) == width for part in parts[:-1])
    assert width == 1 or (width - 1) * whole_head_bytes < gather.SMALLEST_SLICE
    assert len(parts) == 1 or width * whole_head_bytes >= gather.SMALLEST_SLICE


@pytest.mark.parametrize("slices", [1, 5])
def test_closed_form_where_all_ranks_want_all_keys(slices, monkeypatch):
    if slices > 1:
        monkeypatch.setattr(gather, "SMALLEST_SLICE", 1)
    dealing = chunks("contiguous", 101, 4)
    row = 2 * 3 * 5 * 16
    traffic = gather_traffic(dealing, MaskRule(False), Heads(15, 5, 16), batch_size=3, element_bytes=2)
    for held, sent in zip(dealing, traffic, strict=True):
        own = len(held[0])
        assert sent.forward_bytes == 3 * own * row * 2
        assert sent.backward_bytes == 3 * own * row * 2 + (101 - own) * row * 4
        assert (sent.forward_messages, sent.backward_messages) == (3 * slices, 6 * slices)


def test_two_pieces_are_two_messages():
    dealing = chunks("zigzag", 64, 4)  # rank 3 has one chunk, and the others two
    traffic = gather_traffic(dealing, MaskRule(False), Heads(1, 1, 1), batch_size=1, element_bytes=4)
    assert [sent.forward_messages for sent in traffic] == [6, 6, 6, 3]
    assert [sent.backward_messages for sent in traffic] == [6 + 5, 6 + 5, 6 + 5, 3 + 6]


@pytest.mark.parametrize("window", [2, 9, 16])
def test_a_window_sends_the_rows_within_it(window):
    dealing = chunks("contiguous", 64, 4)
    traffic = gather_traffic(dealing, MaskRule(True, window), Heads(1, 1, 1), batch_size=1, element_bytes=1)
    assert [sent.forward_bytes for sent in traffic] == [2 * (window - 1)] * 3 + [0]


def test_gathering_sends_no_more_than_a_ring():
    for layout in ("contiguous", "zigzag", "striped"):
        dealing = chunks(layout, 64, 4)
        for mask in (MaskRule(True), MaskRule(True, 20), MaskRule(True, None, [[0, 14, 40]])):
            arguments = {"batch_size": 1, "element_bytes": 4}
            ring = ring_traffic(dealing, mask, Heads(2, 2, 8), **arguments, backward="keys")
            gathered = gather_traffic(dealing, mask, Heads(2, 2, 8), **arguments)
            assert sum(x.forward_bytes for x in gathered) <= sum(x.forward_bytes for x in ring)
