"""Which ranks can share heads, and what exchanging rows for heads moves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_dist.costs.rotation import Heads
from hydra_dist.costs.ulysses import key_heads_per_rank, ulysses_traffic
from hydra_dist.errors import ConfigError


@pytest.mark.parametrize(
    "query,key,ranks,each", [(8, 8, 8, 1), (8, 8, 2, 4), (8, 2, 4, 1), (8, 1, 8, 1), (12, 6, 3, 2), (5, 5, 1, 5)]
)
def test_heads_are_dealt_evenly(query, key, ranks, each):
    assert key_heads_per_rank(query, key, ranks) == each


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 40))
def test_degrees_that_do_not_fit_are_refused_and_the_suggestions_work(key, group, ranks):
    query = key * group
    fits = query % ranks == 0 and (key % ranks == 0 or ranks % key == 0)
    if fits:
        assert key_heads_per_rank(query, key, ranks) * ranks >= key
        return
    with pytest.raises(ConfigError, match=rf"context\.ulysses_size {ranks}: {query} query heads") as caught:
        key_heads_per_rank(query, key, ranks)
    for word in str(caught.value).split("; ")[-1].removesuffix(" works").split(" or "):
        key_heads_per_rank(query, key, int(word))


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_closed_form_of_even_shards(element_bytes):
    # 1 / P of the heads of each row to each of the others: q, k, v there and the output back, and the same backward.
    heads, rows, ranks = Heads(8, 4, 16), 10, 4
    for sent in ulysses_traffic([rows] * ranks, heads, batch_size=3, element_bytes=element_bytes):
        elements = 3 * rows * (2 * 8 + 2 * 4) * 16 * (ranks - 1) // ranks
        assert sent.forward_bytes == sent.backward_bytes == elements * element_bytes
        assert sent.forward_messages == sent.backward_messages == 4 * (ranks - 1)


def test_key_heads_that_several_ranks_have_come_back_in_fp32():
    (sent, *_) = ulysses_traffic([10] * 4, Heads(8, 2, 16), batch_size=1, element_bytes=2)
    # To each of 3 peers: 2 query heads and one key head of k and v each; back 2 query heads.
    assert sent.forward_bytes == 10 * 3 * 16 * 2 * (2 + 2 * 1 + 2)
    assert sent.backward_bytes == 10 * 3 * 16 * (2 * 2 + 2 * 2 + 2 * 1 * 4)


def test_shards_of_several_lengths():
    heads = Heads(2, 2, 1)
    first, second = ulysses_traffic([7, 3], heads, batch_size=1, element_bytes=1)
    assert (first.forward_bytes, second.forward_bytes) == (7 * 3 + 3, 3 * 3 + 7)
    assert (first.backward_bytes, second.backward_bytes) == (7 + 3 * 3, 3 + 7 * 3)


def test_one_rank_sends_nothing():
    (sent,) = ulysses_traffic([7], Heads(5, 1, 8), batch_size=1, element_bytes=4)
    assert (sent.forward_bytes, sent.forward_messages, sent.backward_bytes, sent.backward_messages) == (0, 0, 0, 0)
