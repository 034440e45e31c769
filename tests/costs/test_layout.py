"""Layouts, against what a plain loop over positions says."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_dist.costs import layout as dealer
from hydra_dist.costs.layout import (
    BALANCE_WANTED,
    LAYOUTS,
    causal_pairs,
    check_dealing,
    chunks,
    cut,
    lengths,
    offsets,
    smallest_sequence,
)
from hydra_dist.errors import ConfigError


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_position_has_one_owner(layouts, positions_of, data):
    layout, sequence_length, num_ranks, documents = data.draw(layouts())
    dealing = chunks(layout, sequence_length, num_ranks, documents)
    assert sorted(position for held in dealing for position in positions_of(held)) == list(range(sequence_length))
    for held in dealing:
        assert all(len(chunk) for chunk in held)
        assert held == sorted(held, key=lambda chunk: chunk.start)
        assert all(a.stop < b.start for a, b in itertools.pairwise(held)), "pieces that touch are one chunk"
        assert offsets(held) == [positions_of(held).index(chunk.start) for chunk in held]
    assert lengths(dealing) == [len(positions_of(held)) for held in dealing]
    assert max(lengths(dealing)) - min(lengths(dealing)) <= 2
    if layout != "striped":
        check_dealing(dealing, sequence_length)


def test_zigzag_pairs_early_pieces_with_late_ones():
    assert chunks("zigzag", 16, 4) == [
        [range(0, 2), range(14, 16)],
        [range(2, 4), range(12, 14)],
        [range(4, 6), range(10, 12)],
        [range(6, 10)],
    ]
    assert chunks("zigzag", 13, 2) == [[range(0, 3), range(9, 13)], [range(3, 9)]]
    assert chunks("contiguous", 13, 3) == [[range(0, 4)], [range(4, 8)], [range(8, 13)]]


def test_striped_takes_turns():
    assert [list(held[0]) for held in chunks("striped", 8, 3)] == [[0, 3, 6], [1, 4, 7], [2, 5]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_rank_has_one_chunk(layout):
    assert chunks(layout, 1, 1) == [[range(1)]]
    assert chunks(layout, 7, 1, [[0, 3]]) == [[range(7)]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_causal_mask_is_balanced_by_all_but_contiguous(layout, positions_of):
    pairs = [sum(position + 1 for position in positions_of(held)) for held in chunks(layout, 1024, 8)]
    if layout == "contiguous":
        assert max(pairs) > 10 * min(pairs)
    elif layout == "striped":
        assert max(pairs) - min(pairs) == 7 * 128
    else:
        assert max(pairs) == min(pairs)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_causal_pairs_are_those_that_a_plain_look_counts(dealings, sees, positions_of, data):
    _, dealing, documents = data.draw(dealings(striped=False))
    documents = documents or [[0]]
    wanted = [
        sum(sees(q, k, True, None, [row]) for row in documents for q in positions_of(held) for k in range(q + 1))
        for held in dealing
    ]
    assert causal_pairs(dealing, documents) == wanted


def packed(generator, sequence_length, shortest, longest):
    """Starts of documents of random lengths."""
    starts = [0]
    while starts[-1] + longest < sequence_length:
        starts.append(starts[-1] + generator.randint(shortest, longest))
    return starts


def imbalance(dealing, documents):
    work = causal_pairs(dealing, documents)
    return max(work) * len(work) / sum(work)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("longest", [64, 1024, 8192, 32768])
def test_balanced_is_never_worse_than_contiguous_or_zigzag_and_even_where_it_can_be(seed, longest):
    generator = random.Random(seed)
    documents = [packed(generator, 65536, 1, longest) for _ in range(2)]
    balanced, contiguous, zigzag = (
        imbalance(chunks(layout, 65536, 8, documents), documents) for layout in ("balanced", "contiguous", "zigzag")
    )
    assert balanced <= contiguous
    assert balanced <= zigzag
    assert balanced <= BALANCE_WANTED == 1.05


def test_the_check_above_rejects_a_layout_that_looks_at_other_documents():
    generator = random.Random(0)
    documents = [packed(generator, 65536, 1, 32768)]
    assert imbalance(chunks("balanced", 65536, 8, documents), documents) <= BALANCE_WANTED
    assert imbalance(chunks("balanced", 65536, 8, [[0]]), documents) > BALANCE_WANTED


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_balanced_is_never_worse_for_short_sequences_either(layouts, data):
    _, sequence_length, num_ranks, documents = data.draw(layouts())
    documents = documents or [[0]]
    balanced, *others = (
        max(causal_pairs(chunks(layout, sequence_length, num_ranks, documents), documents))
        for layout in ("balanced", "zigzag", "contiguous")
    )
    assert balanced <= min(others)


def test_balanced_cuts_no_finer_than_it_has_to():
    one_document = chunks("balanced", 65536, 8, [[0]])
    assert one_document == [sorted(held, key=lambda chunk: chunk.start) for held in one_document]
    assert sum(map(len, one_document)) == sum(map(len, chunks("zigzag", 65536, 8)))
    assert imbalance(one_document, [[0]]) == imbalance(chunks("zigzag", 65536, 8), [[0]]) == 1
    assert chunks("balanced", 65536, 8) == chunks("zigzag", 65536, 8)


def test_pieces_do_not_get_smaller_than_what_is_worth_it():
    # Rows of one long document are all the work, and many ranks: no cut is even, so pieces get as small as they may.
    documents = [[0, *range(40000, 65536)]]
    dealing = chunks("balanced", 65536, 16, documents)
    assert min(len(chunk) for held in dealing for chunk in held) >= dealer.SMALLEST_BALANCED_PIECE


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_cut_deals_on_all_rows_in_order(dealings, positions_of, data):
    _, dealing, _ = data.draw(dealings())
    held = data.draw(st.sampled_from(dealing))
    num_parts = data.draw(st.integers(1, len(positions_of(held))))
    parts = cut(held, num_parts)
    assert [position for part in parts for position in positions_of(part)] == positions_of(held)
    sizes = lengths(parts)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


@pytest.mark.parametrize(
    "wrong,message",
    [
        ([[range(3)], [range(4, 8)]], r"each of the positions 0\.\.7"),
        ([[range(4)], [range(3, 8)]], r"each of the positions 0\.\.7"),
        ([[range(4)], [range(4, 9)]], r"each of the positions 0\.\.7"),
        ([[range(8)], []], "rank 1 has"),
        ([[range(8)], [range(8, 8)]], "rank 1 has"),
    ],
    ids=["hole", "overlap", "too long", "empty rank", "empty chunk"],
)
def test_dealings_that_are_none_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        check_dealing(wrong, 8)


def test_an_unknown_layout_names_the_closest():
    with pytest.raises(
        ConfigError, match=r'zigzg \(did you mean "zigzag"\?\); zigzag, contiguous, striped and balanced exist'
    ):
        chunks("zigzg", 8, 2)


@pytest.mark.parametrize(
    "case", [("zigzag", 7, 4), ("contiguous", 3, 4), ("zigzag", 1, 3), ("striped", 2, 3), ("balanced", 5, 3)]
)
def test_a_sequence_shorter_than_the_pieces_is_refused_and_the_suggestions_work(case):
    layout, sequence_length, num_ranks = case
    with pytest.raises(ConfigError) as caught:
        chunks(layout, sequence_length, num_ranks)
    words = str(caught.value).split("; ")[-1].replace(",", "").split()
    shortest = int(words[words.index("sequence") + 2])
    assert shortest == smallest_sequence(layout, num_ranks)
    chunks(layout, shortest, num_ranks)
    chunks(layout, sequence_length, int(words[words.index("context.size") + 1]))


def test_no_ranks_are_refused():
    with pytest.raises(ConfigError, match="at least 1 rank"):
        chunks("zigzag", 8, 0)
