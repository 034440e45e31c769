"""What the tests of dealings share: random ones, random documents, and the mask's definition, pair by pair."""

import pytest
from hypothesis import strategies as st

from hydra_dist.costs.layout import LAYOUTS, chunks


@st.composite
def _documents(draw, sequence_length):
    """Sorted starts for 1 to 3 batch rows."""
    rows = draw(st.integers(1, 3))
    starts = st.sets(st.integers(1, sequence_length - 1), max_size=6) if sequence_length > 1 else st.just(set())
    return [sorted({0} | draw(starts)) for _ in range(rows)]


@st.composite
def _layouts(draw, among=LAYOUTS):
    """(layout, S, P, documents) that fit together."""
    num_ranks = draw(st.integers(1, 9))
    sequence_length = draw(st.integers(2 * num_ranks, 70))
    documents = draw(st.none() | _documents(sequence_length))
    return draw(st.sampled_from(among)), sequence_length, num_ranks, documents


@st.composite
def _explicit(draw):
    """(S, dealing, documents): any runs of positions to any ranks, each in ascending order."""
    num_ranks = draw(st.integers(1, 5))
    sequence_length = draw(st.integers(num_ranks, 40))
    owners = [*range(num_ranks), *draw(st.lists(st.integers(0, num_ranks - 1), max_size=8))][:sequence_length]
    owners = draw(st.permutations(owners))
    inside = st.integers(1, sequence_length - 1) if sequence_length > 1 else st.nothing()
    cuts = draw(st.sets(inside, min_size=len(owners) - 1, max_size=len(owners) - 1)) if len(owners) > 1 else set()
    edges = [0, *sorted(cuts), sequence_length]
    dealing = [[] for _ in range(num_ranks)]
    for owner, start, stop in zip(owners, edges, edges[1:], strict=False):
        dealing[owner].append(range(start, stop))
    return sequence_length, dealing, draw(st.none() | _documents(sequence_length))


@st.composite
def _dealings(draw, striped=True):
    """(S, dealing, documents) of any layout or of none."""
    if draw(st.booleans()):
        return draw(_explicit())
    layouts = [layout for layout in LAYOUTS if striped or layout != "striped"]
    layout, sequence_length, num_ranks, documents = draw(_layouts(layouts))
    return sequence_length, chunks(layout, sequence_length, num_ranks, documents), documents


@st.composite
def _masks(draw, sequence_length):
    """(causal, window)"""
    return draw(st.booleans()), draw(st.none() | st.integers(1, sequence_length + 3))


def _positions_of(held):
    return [position for chunk in held for position in chunk]


def _sees(q, k, causal, window, documents):
    """Whether in some batch row the query at position q sees the key at k."""
    if (causal or window is not None) and k > q:
        return False
    if window is not None and q - k >= window:
        return False
    return documents is None or any(max(s for s in row if s <= q) == max(s for s in row if s <= k) for row in documents)


@pytest.fixture(scope="session")
def layouts():
    return _layouts


@pytest.fixture(scope="session")
def dealings():
    return _dealings


@pytest.fixture(scope="session")
def masks():
    return _masks


@pytest.fixture(scope="session")
def positions_of():
    return _positions_of


@pytest.fixture(scope="session")
def sees():
    return _sees
