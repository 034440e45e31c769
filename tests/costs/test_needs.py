"""Which rows a rank is sent, against the mask's definition over all pairs of positions."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_dist.costs import needs
from hydra_dist.costs.layout import chunks
from hydra_dist.costs.needs import MaskRule, number_of, united, wanted_rows


def brute_force(dealing, owner, reader, side, causal, window, documents, sees, positions_of):
    """The local rows of the owner that pair with a row of the reader."""
    others = positions_of(dealing[reader])

    def pair(mine, other):
        q, k = (other, mine) if side == "keys" else (mine, other)
        return sees(q, k, causal, window, documents)

    mine = positions_of(dealing[owner])
    return [row for row, position in enumerate(mine) if any(pair(position, other) for other in others)]


def listed(rows):
    return [row for part in rows for row in part]


@pytest.fixture(scope="session")
def holds(dealings, masks, sees, positions_of):
    """Whether wanted_rows is what it says it is, for one random case."""

    def check(data):
        sequence_length, dealing, documents = data.draw(dealings())
        causal, window = data.draw(masks(sequence_length))
        mask = MaskRule(causal, window, documents)
        side = data.draw(st.sampled_from(["keys", "queries"]))
        striped = any(chunk.step > 1 for held in dealing for chunk in held)
        for owner in range(len(dealing)):
            for reader in range(len(dealing)):
                if owner == reader:
                    continue
                rows = wanted_rows(dealing, owner, reader, side, mask)
                found = listed(rows)
                assert found == sorted(set(found))
                assert all(a.stop < b.start for a, b in itertools.pairwise(rows))
                wanted = brute_force(dealing, owner, reader, side, causal, window, documents, sees, positions_of)
                if striped and wanted:
                    wanted = list(range(len(positions_of(dealing[owner]))))
                if found != wanted:
                    return False
        return True

    return check


def test_wanted_rows_are_those_of_a_plain_look_at_all_pairs(holds):
    @settings(max_examples=400, deadline=None)
    @given(st.data())
    def check(data):
        assert holds(data)

    check()


@pytest.mark.parametrize("name", ["first_of", "stop_of"])
def test_the_check_above_rejects_documents_that_are_ignored(holds, name, monkeypatch):
    monkeypatch.setattr(MaskRule, name, lambda self, position: {"first_of": 0, "stop_of": needs._FAR}[name])

    @settings(max_examples=400, deadline=None, database=None)
    @given(st.data())
    def check(data):
        assert holds(data)

    with pytest.raises(AssertionError):
        check()


def test_a_window_wants_the_rows_within_it():
    dealing = chunks("contiguous", 64, 4)
    for window, rows in ((1, ()), (2, (range(15, 16),)), (9, (range(8, 16),)), (18, (range(16),))):
        assert wanted_rows(dealing, 0, 1, "keys", MaskRule(True, window)) == rows
    assert wanted_rows(dealing, 0, 2, "keys", MaskRule(True, 17)) == ()
    assert wanted_rows(dealing, 0, 2, "keys", MaskRule(True, 18)) == (range(15, 16),)
    assert wanted_rows(dealing, 1, 0, "queries", MaskRule(True, 9)) == (range(8),)
    assert wanted_rows(dealing, 1, 0, "keys", MaskRule(True, 9)) == ()


def test_striped_neighbours_within_a_window():
    dealing = chunks("striped", 64, 8)
    for reader in range(1, 8):
        for window in range(1, 9):
            found = wanted_rows(dealing, 0, reader, "keys", MaskRule(True, window))
            assert found == ((range(8),) if window > reader else ())


def test_ranges_unite():
    assert united([range(4, 6), range(0, 2), range(2, 3), range(5, 9), range(3, 3)]) == (range(0, 3), range(4, 9))
    assert number_of((range(0, 3), range(4, 9))) == 8
    assert united([]) == ()
