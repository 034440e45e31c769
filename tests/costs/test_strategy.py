"""Which strategy is chosen, by what numbers, and whether these are those that are counted exactly."""

import pytest

from hydra_dist.config import Config
from hydra_dist.costs.gather import gather_traffic
from hydra_dist.costs.layout import chunks
from hydra_dist.costs.needs import MaskRule
from hydra_dist.costs.rotation import Heads, ring_traffic
from hydra_dist.costs.strategy import resolve
from hydra_dist.costs.ulysses import ulysses_traffic


def config(size, length=65536, queries=16, keys=16, window=None, precision="bf16", **context):
    heads = {"hidden_size": 2048, "head_dim": 128, "num_query_heads": queries, "num_key_heads": keys}
    return Config.model_validate(
        {
            "model": {"num_layers": 1, "attention": "gqa", "window": window, **heads},
            "data": {"directory": "x", "sequence_length": length},
            "run": {"directory": "y"},
            "context": {"size": size, "strategy": "auto", **context},
            "train": {"precision": precision, "device": "cuda"},
        }
    )


def all_of(choice):
    return [choice.chosen, *choice.others]


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("window", [None, 1024])
@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (16, 4), (8, 1)])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_bytes_are_close_to_those_counted_over_all_pairs_of_ranks(layout, window, queries, keys, precision):
    settings = config(8, 65536, queries, keys, window, precision, layout=layout)
    element_bytes = 2 if precision == "bf16" else 4
    amounts = {"batch_size": 1, "element_bytes": element_bytes}
    mask = MaskRule(True, window)
    for candidate in all_of(resolve(settings)):
        on_ring = Heads(queries // candidate.ulysses, max(1, keys // candidate.ulysses), 128)
        dealing = chunks(layout, 65536, candidate.ring)
        count = gather_traffic if candidate.strategy == "all_gather" else ring_traffic
        exact = count(dealing, mask, on_ring, **amounts)
        exchange = ulysses_traffic([65536 // 8] * candidate.ulysses, Heads(queries, keys, 128), **amounts)
        mean = sum(rank.forward_bytes + rank.backward_bytes for rank in exact) / len(exact)
        mean += exchange[0].forward_bytes + exchange[0].backward_bytes
        # A window's edges are counted for every rank, also for the first one and the last one, which have fewer.
        assert candidate.sent == pytest.approx(mean, rel=0.05 if window is None else 0.35)


def test_one_rank_needs_no_strategy():
    choice = resolve(config(1))
    assert (choice.chosen.ring, choice.chosen.ulysses, choice.chosen.sent) == (1, 1, 0)


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "ulysses"])
def test_what_is_configured_is_taken(strategy):
    choice = resolve(config(8, strategy=strategy))
    assert choice.chosen.strategy == strategy
    assert choice.why == "as configured"
    assert not choice.others


def test_a_hybrid_of_a_given_size_is_taken_and_one_without_is_chosen():
    given = resolve(config(8, strategy="hybrid", ulysses_size=4)).chosen
    assert (given.strategy, given.ring, given.ulysses) == ("hybrid", 2, 4)
    assert resolve(config(8, strategy="hybrid", ulysses_size=1)).chosen.strategy == "ring"
    chosen = resolve(config(8, strategy="hybrid"))
    assert chosen.chosen.strategy == "hybrid"
    assert chosen.chosen.seconds == min(option.seconds for option in all_of(chosen))


def test_auto_takes_the_least_time_and_says_what_else_there_was():
    choice = resolve(config(8))
    assert {option.strategy for option in all_of(choice)} == {"ring", "all_gather", "ulysses", "hybrid"}
    assert choice.chosen.seconds == min(option.seconds for option in all_of(choice))
    assert choice.others[0].describe() in choice.why


def test_long_sequences_hide_the_ring_and_slow_links_with_short_ones_favour_fewer_bytes():
    assert resolve(config(8, 2**20, 8, 2)).chosen.strategy == "ring"
    slow = config(8, 8192, 16, 16, intra_node_bandwidth=1.0)
    fewest = min(all_of(resolve(slow)), key=lambda option: option.sent)
    assert resolve(slow).chosen == fewest
    assert fewest.strategy in ("ulysses", "hybrid")


def test_heads_that_cannot_be_shared_leave_ulysses_out_and_say_so():
    choice = resolve(config(16, 2**20, 8, 2))
    assert "ulysses" not in {option.strategy for option in all_of(choice)}
    assert "ulysses cannot deal the heads of every layer to 16 ranks" in choice.why


def test_a_ring_over_nodes_is_a_ring_of_rings():
    choice = resolve(config(16, 2**20, 8, 2))
    assert choice.chosen.strategy == "ring"
    assert choice.chosen.inner_ring == 8
    flat = resolve(config(16, 2**20, 8, 2, strategy="ring")).chosen
    assert flat.inner_ring is None
    assert flat.seconds > choice.chosen.seconds
