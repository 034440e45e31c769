"""A setup that works is said to work, and one that is broken is not."""

import math

import pytest
import torch

from hydra_dist.context import ring, rotation, ulysses
from hydra_dist.drop_in import (
    ContextParallelAttentionConfig,
    RingAttentionConfig,
    estimate_context_parallel_efficiency,
    validate_ring_attention_setup,
)
from hydra_dist.drop_in.validation import ROWS
from hydra_dist.errors import ConfigError


def config(strategy="ring", **settings):
    return ContextParallelAttentionConfig(32, 4, num_key_heads=2, head_dim=8, strategy=strategy, **settings)


@pytest.mark.parametrize(
    ("shape", "ranks", "grid"),
    [
        (RingAttentionConfig(32, 4, num_key_heads=2), 4, (4, 1)),
        (config("ring", attention="ccgqa", layout="contiguous", window=40), 3, (3, 1)),
        (config("all_gather", layout="striped"), 3, (3, 1)),
        (config("ulysses", attention="ccgqa"), 2, (1, 2)),
        (config("hybrid"), (2, 2), (2, 2)),
        (config(), 1, (1, 1)),
    ],
    ids=["ring", "ccgqa", "all_gather", "ulysses", "hybrid", "one rank"],
)
def test_what_works_is_said_to_work(shape, ranks, grid):
    report = validate_ring_attention_setup(shape, ranks)
    assert report.works
    assert report.largest_error < 1e-12
    assert report.ranks == grid
    length = ROWS * math.prod(grid) + 1
    traffic = estimate_context_parallel_efficiency(shape, length, ranks, element_bytes=8).traffic
    assert report.bytes_sent == max(rank.forward_bytes + rank.backward_bytes for rank in traffic)


def own_keys_only(monkeypatch):
    attend = ring.attend_tiles

    def only_first(*inputs, fresh, **options):
        if fresh:
            attend(*inputs, fresh=fresh, **options)

    monkeypatch.setattr(ring, "attend_tiles", only_first)


def gradients_come_home(monkeypatch, factor):
    begin = rotation.Followers.__init__

    def changed(self, *inputs):
        begin(self, *inputs)
        come_home = self.home
        self.home = lambda *came: come_home(*came[:-1], came[-1] * factor)

    monkeypatch.setattr(rotation.Followers, "__init__", changed)


def gradients_get_lost(monkeypatch):
    gradients_come_home(monkeypatch, 0.0)


def gradients_are_no_numbers(monkeypatch):
    gradients_come_home(monkeypatch, torch.nan)


@pytest.mark.parametrize("breaks", [own_keys_only, gradients_get_lost, gradients_are_no_numbers])
def test_a_broken_ring_is_said_not_to_work(breaks, monkeypatch):
    assert validate_ring_attention_setup(config(), 3).works
    breaks(monkeypatch)
    report = validate_ring_attention_setup(config(), 3)
    assert not report.works
    assert not report.largest_error < 1e-3


def test_heads_in_the_wrong_place_are_said_not_to_work(monkeypatch):
    assert validate_ring_attention_setup(config("ulysses"), 2).works
    to_heads = ulysses.HeadExchange.to_heads

    def swapped(self, *inputs, **options):
        return [x.flip(2) for x in to_heads(self, *inputs, **options)]

    monkeypatch.setattr(ulysses.HeadExchange, "to_heads", swapped)
    assert not validate_ring_attention_setup(config("ulysses"), 2).works


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ConfigError, match="cannot be dealt to 8 ranks"):
        validate_ring_attention_setup(config("ulysses"), 8)
    with pytest.raises(ConfigError, match="uses the ring dimension only"):
        validate_ring_attention_setup(config("ring"), (2, 2))
