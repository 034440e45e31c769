"""Tiles cover what the mask allows, each pair once, and nothing else."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_dist.costs import tiles as tiling
from hydra_dist.costs.tiles import Span, Tile, executed_pairs, needed_pairs, own_tiles, tiles


def positions_of(spans):
    rows = np.full(max(span.row_stop for span in spans), -1)
    for span in spans:
        rows[span.row_start : span.row_stop] = np.arange(span.position, span.stop, span.stride)
    return rows


def brute_force(q_spans, k_spans, causal, window, documents, batch_size):
    """bool [B, Sq, Sk] from the definition, pair by pair of positions."""
    q, k = positions_of(q_spans)[:, None], positions_of(k_spans)[None, :]
    allowed = np.ones((batch_size, q.shape[0], k.shape[1]), dtype=bool)
    if causal:
        allowed &= k <= q
    if window is not None:
        allowed &= (k <= q) & (q - k < window)
    for batch, starts in enumerate(documents or []):
        allowed[batch] &= np.searchsorted(starts, q, "right") == np.searchsorted(starts, k, "right")
    return allowed


def count_covered(found, q_spans, k_spans, batch_size):
    """How many tiles compute each pair, int [B, Sq, Sk]; checks each tile's own promises on the way."""
    q_positions, k_positions = positions_of(q_spans), positions_of(k_spans)
    counts = np.zeros((batch_size, len(q_positions), len(k_positions)), dtype=int)
    for tile in found:
        shape = (tile.q_stop - tile.q_start, tile.k_stop - tile.k_start)
        assert tile.kind == "masked" or (tile.offset, tile.window) == (0, None)
        if tile.kind == "full":
            seen = np.ones(shape, dtype=bool)
        elif tile.kind == "causal":
            assert shape[0] == shape[1]
            seen = np.tril(np.ones(shape, dtype=bool))
        else:
            apart = tile.offset + np.arange(shape[0])[:, None] - np.arange(shape[1])
            assert tile.window is not None
            seen = (apart >= 0) & (apart < tile.window)
            assert not seen.all()
        assert seen.any(axis=1).all(), f"a query of {tile} sees no key of it"
        rows = slice(None) if tile.batch is None else tile.batch
        counts[rows, tile.q_start : tile.q_stop, tile.k_start : tile.k_stop] += seen
    return counts


def covers(q_spans, k_spans, causal, window, documents, batch_size, found=None):
    if found is None:
        found = tiles(q_spans, k_spans, causal=causal, window=window, documents=documents)
    counts = count_covered(found, q_spans, k_spans, batch_size)
    allowed = brute_force(q_spans, k_spans, causal, window, documents, batch_size)
    return counts.shape == allowed.shape and (counts == allowed).all()


def spans_of(pieces):
    """Lay pieces (start, stop) of a sequence side by side in rows."""
    spans, row = [], 0
    for start, stop in pieces:
        spans.append(Span(row, row + stop - start, start))
        row += stop - start
    return spans


@st.composite
def some_pieces(draw, length):
    """Some of the pieces that a few cuts make of a sequence, as a rank of any layout may hold them."""
    cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=4))) if length > 1 else []
    edges = [0, *cuts, length]
    pieces = list(itertools.pairwise(edges))
    chosen = draw(st.sets(st.sampled_from(pieces), min_size=1))
    return spans_of(sorted(chosen))


@st.composite
def every_nth_row(draw, length, stride):
    """The rows of a rank of a striped layout, or a run of some of them."""
    held = range(draw(st.integers(0, min(stride, length) - 1)), length, stride)
    first = draw(st.integers(0, len(held) - 1))
    last = draw(st.integers(first, len(held) - 1))
    return [Span(0, last - first + 1, held[first], stride)]


@st.composite
def problems(draw, longest, strided=False):
    length = draw(st.integers(1, longest))
    batch_size = draw(st.integers(1, 3))
    starts = st.sets(st.integers(1, length), max_size=6).map(lambda s: [0, *sorted(s)])
    documents = draw(st.none() | st.lists(starts, min_size=batch_size, max_size=batch_size))
    window = draw(st.none() | st.integers(1, length + 3))
    rows = every_nth_row(length, draw(st.integers(1, 7))) if strided else some_pieces(length)
    return draw(rows), draw(rows), draw(st.booleans()), window, documents, batch_size


@pytest.fixture(params=["as shipped", "tiny"])
def block_sizes(request):
    """Tiny blocks bring all the cases of a window into short sequences."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "tiny":
            patch.setattr(tiling, "SMALLEST_BLOCK", 2)
            patch.setattr(tiling, "LARGEST_BLOCK", 8)
            patch.setattr(tiling, "WIDEST_MASK", 12)
        yield


def test_every_allowed_pair_exactly_once(block_sizes):
    @settings(max_examples=300, deadline=None)
    @given(problems(longest=48))
    def check(problem):
        assert covers(*problem)

    check()


def test_every_allowed_pair_exactly_once_of_rows_with_strides(block_sizes):
    @settings(max_examples=300, deadline=None)
    @given(problems(longest=80, strided=True))
    def check(problem):
        assert covers(*problem)

    check()


def striped(rank, num_ranks, length):
    held = range(rank, length, num_ranks)
    return [Span(0, len(held), rank, num_ranks)]


@pytest.mark.parametrize("window", [None, 1, 2, 255, 900])
def test_long_striped_rows_with_the_shipped_blocks(window):
    for q_rank, k_rank in itertools.product((0, 2), repeat=2):
        q, k = striped(q_rank, 3, 1600), striped(k_rank, 3, 1600)
        assert covers(q, k, True, window, [[0, 100, 101, 1300]], 1)


def test_spans_know_their_rows():
    span = Span(4, 9, 3, 5)  # 3 8 13 18 23
    assert span.stop == 24
    assert [span.index(position) for position in (0, 3, 4, 8, 9, 23, 24, 99)] == [0, 0, 1, 1, 2, 4, 5, 5]


def test_spans_of_different_strides_are_refused():
    with pytest.raises(ValueError, match="the same stride"):
        tiles([Span(0, 4, 0)], [Span(0, 4, 0, 2)], causal=True, window=None, documents=None)


def test_the_check_above_rejects_striped_rows_read_as_contiguous():
    q, k = striped(0, 3, 60), striped(1, 3, 60)
    assert covers(q, k, True, None, None, 1)
    one_run = [Span(0, 20, 0)], [Span(0, 20, 20)]
    assert not covers(q, k, True, None, None, 1, found=tiles(*one_run, causal=True, window=None, documents=None))
    # A query at 3 i sees the key at 1 + 3 j only if j < i: the shift of one that the lower rank has.
    same_start = [Span(0, 20, 0, 3)], [Span(0, 20, 0, 3)]
    assert not covers(q, k, True, None, None, 1, found=tiles(*same_start, causal=True, window=None, documents=None))


@pytest.mark.parametrize("window", [1, 63, 64, 65, 255, 300, 900, 1200, 1600])
def test_long_windows_with_the_shipped_blocks(window):
    spans = spans_of([(0, 700), (900, 1500)])
    assert covers(spans, spans_of([(0, 1500)]), True, window, None, 1)
    assert covers(spans, spans, True, window, [[0, 100, 101, 1300]], 1)


def test_the_checks_above_reject_wrong_tiles():
    spans = [Span(0, 40, 0)]
    problem = (spans, spans, True, 5, [[0, 10]], 1)
    assert covers(*problem)

    def wrong(**change):
        return tiles(spans, spans, **{"causal": True, "window": 5, "documents": [[0, 10]], **change})

    assert not covers(*problem, found=wrong(window=6))
    assert not covers(*problem, found=wrong(window=4))
    assert not covers(*problem, found=wrong(documents=None))
    assert not covers(*problem, found=wrong(documents=[[0, 11]]))
    assert not covers(*problem, found=wrong() + wrong()[:1])
    assert not covers(spans, spans, True, None, None, 1, found=wrong(causal=False, window=None, documents=None))


def test_kinds_of_the_zigzag_ring():
    """Two chunks a rank, as on ranks 0 and 1 of 2: one full tile for each hop, and no mask anywhere."""
    rank_0, rank_1 = spans_of([(0, 8), (24, 32)]), spans_of([(8, 16), (16, 24)])

    def shapes(q, k):
        found = tiles(q, k, causal=True, window=None, documents=None)
        return [(tile.kind, tile.q_start, tile.q_stop, tile.k_start, tile.k_stop) for tile in found]

    own = [("causal", 0, 8, 0, 8), ("full", 8, 16, 0, 8), ("causal", 8, 16, 8, 16)]
    assert shapes(rank_0, rank_0) == own
    assert shapes(rank_1, rank_0) == [("full", 0, 16, 0, 8)]
    assert shapes(rank_0, rank_1) == [("full", 8, 16, 0, 16)]


def test_keys_before_and_after_the_queries():
    early, late = spans_of([(0, 10)]), spans_of([(10, 20)])
    assert [tile.kind for tile in tiles(late, early, causal=True, window=None, documents=None)] == ["full"]
    assert tiles(early, late, causal=True, window=None, documents=None) == ()
    assert tiles(early, late, causal=False, window=None, documents=None) == (Tile(None, 0, 10, 0, 10, "full"),)
    assert tiles(late, early, causal=True, window=1, documents=None) == ()
    assert tiles(late, early, causal=True, window=None, documents=[[0, 10]]) == ()
    assert tiles([], early, causal=True, window=None, documents=None) == ()
    assert tiles([Span(0, 0, 0)], early, causal=False, window=None, documents=None) == ()


def test_batch_rows_share_tiles_where_they_agree():
    spans = spans_of([(0, 12)])
    same = tiles(spans, spans, causal=True, window=None, documents=[[0, 5], [0, 5]])
    assert {tile.batch for tile in same} == {None}
    different = tiles(spans, spans, causal=True, window=None, documents=[[0, 5], [0]])
    assert [tile.batch for tile in different] == [0, 0, 1]
    assert executed_pairs(same, batch_size=2) == 2 * (15 + 28)
    assert executed_pairs(different, batch_size=2) == 15 + 28 + 78


def test_pairs_are_counted(block_sizes):
    @settings(max_examples=100, deadline=None)
    @given(problems(longest=40))
    def check(problem):
        q_spans, k_spans, causal, window, documents, batch_size = problem
        found = tiles(q_spans, k_spans, causal=causal, window=window, documents=documents)
        needed = int(brute_force(*problem).sum())
        assert needed_pairs(found, batch_size) == needed
        assert executed_pairs(found, batch_size) >= needed

    check()


@pytest.mark.parametrize("window", [16, 256, 2048])
def test_work_and_calls_grow_with_sequence_times_window(window):
    def cost(length):
        spans = [Span(0, length, 0)]
        found = tiles(spans, spans, causal=True, window=window, documents=None)
        assert executed_pairs(found) <= length * (window + 2 * tiling.LARGEST_BLOCK)
        assert all(tile.pairs <= tiling.LARGEST_BLOCK * tiling.WIDEST_MASK for tile in found if tile.kind == "masked")
        return executed_pairs(found), len(found)

    (short_pairs, short_count), (long_pairs, long_count) = cost(16384), cost(65536)
    assert long_pairs < 4.6 * short_pairs
    assert long_count <= 4.6 * short_count


def test_a_window_sees_at_least_the_query_itself():
    with pytest.raises(ValueError, match="smallest window is 1"):
        tiles([Span(0, 4, 0)], [Span(0, 4, 0)], causal=True, window=0, documents=None)


def test_costs_import_no_torch():
    code = "import sys, hydra_dist.costs.tiles; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("documents", [None, [[0, 12, 30], [0, 1, 25, 26, 44]]], ids=["one document", "documents"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pieces", [[(0, 10), (38, 48)], [(0, 48)], [(5, 6), (7, 20), (30, 31)], [(12, 30)]])
def test_rows_over_themselves_make_one_tile_for_each_document(pieces, causal, documents):
    spans = spans_of(pieces)
    found = own_tiles(spans, causal=causal, window=None, documents=documents)
    assert covers(spans, spans, causal, None, documents, 2, found=found)
    held = [position for a, b in pieces for position in range(a, b)]
    starts = documents or [[0]]
    assert len(found) == sum(len({max(s for s in row if s <= p) for p in held}) for row in starts)


@pytest.mark.parametrize("spans", [[Span(0, 5, 20), Span(5, 9, 3)], [Span(0, 9, 1, 3)]], ids=["descending", "striped"])
def test_rows_in_another_order_make_the_tiles_of_any_two_sides(spans):
    found = own_tiles(spans, causal=True, window=None, documents=[[0, 7]])
    assert covers(spans, spans, True, None, [[0, 7]], 1, found=found)


def test_a_window_over_own_rows_counts_what_lies_between_them():
    spans = spans_of([(0, 10), (14, 30)])
    found = own_tiles(spans, causal=True, window=6, documents=None)
    assert covers(spans, spans, True, 6, None, 1, found=found)
