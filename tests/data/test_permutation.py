import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_dist.data.permutation import Permutation


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**63), epoch=st.integers(0, 100))
def test_every_index_is_met_once(size, seed, epoch):
    permutation = Permutation(size, seed, epoch)
    assert sorted(permutation(i) for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17])
def test_smallest_sizes(size):
    assert {Permutation(size, 0, 0)(i) for i in range(size)} == set(range(size))


def test_without_cycle_walking_it_would_leave_the_range():
    permutation = Permutation(1000, 0, 0)
    once = {permutation._encrypt(i) for i in range(1000)}
    assert len(once) == 1000
    assert once != set(range(1000))


def order(seed, epoch, size=512):
    permutation = Permutation(size, seed, epoch)
    return [permutation(i) for i in range(size)]


def test_seeds_and_epochs_have_unrelated_orders():
    orders = [order(0, 0), order(0, 1), order(1, 0), list(range(512))]
    for n, a in enumerate(orders):
        for b in orders[n + 1 :]:
            assert sum(x == y for x, y in zip(a, b, strict=True)) < 8  # one is expected
    assert order(3, 4) == order(3, 4)


def test_every_place_is_about_equally_likely():
    size, runs = 7, 2100
    counts = [0] * size
    for epoch in range(runs):
        counts[Permutation(size, 1, epoch)(3)] += 1
    expected = runs / size
    assert sum((c - expected) ** 2 / expected for c in counts) < 22.5  # chi-square, 6 degrees, p = 0.001


def test_sizes_beyond_memory_cost_nothing():
    permutation = Permutation(10**15, 0, 0)
    assert len({permutation(i) for i in range(100)}) == 100


def test_out_of_range():
    with pytest.raises(ValueError, match="size 0"):
        Permutation(0, 0, 0)
    for index in (-1, 5):
        with pytest.raises(ValueError, match=f"index {index}"):
            Permutation(5, 0, 0)(index)
