"""Every held-out target is scored once, on any number of replicas, and lands in the bins where it stands."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from hydra_dist.context import ContextParallel
from hydra_dist.costs.strategy import Candidate, Choice
from hydra_dist.data import Dataset, Sampler
from hydra_dist.train.evaluate import bin_edges, evaluate
from hydra_dist.train.mesh import Mesh

LENGTH = 100
ALONE = Mesh(
    torch.device("cpu"),
    rank=0,
    world_size=1,
    data_rank=0,
    data_size=1,
    context_size=1,
    context=None,
    choice=Choice(Candidate("ring", 1, 1, None, 0.0, 0.0), (), "one rank"),
)


@pytest.fixture(autouse=True)
def group():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture
def held_out(tiny_corpus):
    return Sampler(Dataset(tiny_corpus, "eval"), LENGTH, seed=0)


def one_bit(tokens, plan, targets):
    """A model that is wrong by one bit everywhere."""
    return torch.where(targets >= 0, math.log(2), 0.0)


def place_in_document(tokens, plan, targets):
    return torch.where(targets >= 0, (plan.positions - plan.document_starts).float(), 0.0)


def test_one_bit_a_target_is_targets_over_bytes(held_out):
    result = evaluate(one_bit, held_out, ContextParallel(None), ALONE)
    split = held_out.dataset
    # Every token but the first of each document is a target.
    assert result["targets"] == split.num_tokens - split.num_documents
    assert result["text_bytes"] == split.text_bytes
    assert result["bits_per_byte"] == pytest.approx(result["targets"] / split.text_bytes)
    assert result["loss"] == pytest.approx(math.log(2))
    for name in ("loss_by_position", "loss_by_context"):
        assert sum(part["targets"] for part in result[name]) == result["targets"]
        assert result[name][-1]["stop"] == LENGTH


def test_replicas_share_the_rows_without_repeating_one(held_out):
    whole = evaluate(one_bit, held_out, ContextParallel(None), ALONE)
    parts = [
        evaluate(one_bit, held_out, ContextParallel(None), replace(ALONE, data_size=3, data_rank=rank))
        for rank in range(3)
    ]
    assert sum(part["targets"] for part in parts) == whole["targets"]
    assert sum(part["text_bytes"] for part in parts) == whole["text_bytes"]


def test_places_are_counted_from_the_document(held_out):
    result = evaluate(place_in_document, held_out, ContextParallel(None), ALONE)
    for part in result["loss_by_context"]:
        if part["targets"]:
            assert part["start"] <= part["loss"] < part["stop"]
    assert result["loss_by_position"] != result["loss_by_context"], "documents begin inside rows"


def test_the_first_rows_alone(held_out):
    result = evaluate(one_bit, held_out, ContextParallel(None), ALONE, max_rows=2)
    assert result["rows"] == 2
    assert 0 < result["targets"] <= 2 * LENGTH


def test_bins_double():
    assert bin_edges(100).tolist() == [0, 16, 32, 64]
    assert bin_edges(16).tolist() == [0]
    assert bin_edges(17).tolist() == [0, 16]
