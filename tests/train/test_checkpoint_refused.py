"""Checkpoints that are not loaded: damaged ones, and those of another model, optimizer or tokenizer."""

import json
import os
import re

import pytest
import torch

from hydra_dist.config import ModelConfig
from hydra_dist.errors import ConfigError, RunError
from hydra_dist.train import checkpoint
from hydra_dist.train.checkpoint import manifest as checkpoint_manifest
from tests.train.checkpoint_fakes import MODEL, FakeState, on_ranks, save


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """fsync is counted and made to fail, but what it waits for shows only when the machine loses power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def two(tmp_path):
    """A folder with checkpoints of steps 5 and 10, written by two ranks."""
    for step in (5, 10):
        assert not [e for e in on_ranks(2, lambda p, s=step: save(tmp_path, s, FakeState(s), peers=p)) if e is None]
    return tmp_path


def flip(file, position):
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def shard(path, kind="weights", rank=0):
    return path / f"{kind}-0000{rank}-of-00002.safetensors"


def swap(path):
    """Two shards of equal size change places."""
    one, other, aside = shard(path, "optimizer", 0), shard(path, "optimizer", 1), path / "aside"
    one.rename(aside), other.rename(one), aside.rename(other)


def edit(path, change):
    """Change the manifest, and leave its checksum in order."""
    file = path / "manifest.json"
    content = json.loads(file.read_text())
    change(content)
    del content["checksum"]
    content["checksum"] = checkpoint_manifest._checksum(content)
    file.write_text(json.dumps(content))


UNLISTED = "weights-00009-of-00009.safetensors"
DAMAGE = {
    "first byte of a shard": (lambda p: flip(shard(p), 0), "is damaged: its sha256"),
    "header of a shard": (lambda p: flip(shard(p), 40), "is damaged: its sha256"),
    "last byte of a shard": (lambda p: flip(shard(p, rank=1), -1), "is damaged: its sha256"),
    "optimizer shard": (lambda p: flip(shard(p, "optimizer"), -9), "is damaged: its sha256"),
    "truncated shard": (lambda p: os.truncate(shard(p), 50), "has 50 bytes instead of"),
    "empty shard": (lambda p: os.truncate(shard(p), 0), "has 0 bytes instead of"),
    "longer shard": (lambda p: shard(p).write_bytes(shard(p).read_bytes() + b"x"), "bytes instead of"),
    "missing shard": (lambda p: shard(p, rank=1).unlink(), "cannot be read"),
    "swapped shards": (swap, "instead of|is damaged"),
    "missing manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "empty manifest": (lambda p: os.truncate(p / "manifest.json", 0), "is no JSON"),
    "half a manifest": (lambda p: os.truncate(p / "manifest.json", 300), "is no JSON"),
    "binary manifest": (lambda p: (p / "manifest.json").write_bytes(b"\xff\x00"), "cannot be read"),
    "a list": (lambda p: (p / "manifest.json").write_text("[]"), "is not a manifest"),
    "deep nonsense": (lambda p: (p / "manifest.json").write_text("[" * 100_000), "is no JSON"),
    "changed number": (
        lambda p: (p / "manifest.json").write_text(
            re.sub('"step": 10', '"step": 11', (p / "manifest.json").read_text())
        ),
        "its checksum differs",
    ),
    "unknown key": (lambda p: edit(p, lambda c: c.update(surprise=1)), "surprise: Extra inputs"),
    "missing key": (lambda p: edit(p, lambda c: c.pop("data_step")), "data_step: Field required"),
    "text for a number": (lambda p: edit(p, lambda c: c.update(step="10")), "step: Input should be a valid integer"),
    "path that leaves": (
        lambda p: edit(p, lambda c: c["parameters"]["scale"]["weight"].update(file="../latest")),
        "parameters.scale.weight.file: String should match",
    ),
    "file that leaves": (
        lambda p: edit(p, lambda c: c["files"].update({"../x.safetensors": {"bytes": 1, "sha256": "0" * 64}})),
        "String should match",
    ),
    "unlisted file": (
        lambda p: edit(
            p, lambda c: c["parameters"]["scale"]["weight"].update(file="weights-00009-of-00009.safetensors")
        ),
        "which it does not list",
    ),
    "no weight": (lambda p: edit(p, lambda c: c["parameters"]["scale"].pop("weight")), "has no weight for scale"),
    "entry elsewhere": (
        lambda p: edit(p, lambda c: c["parameters"]["scale"]["weight"].update(file=other_shard(c))),
        "cannot be read",
    ),
    "another version": (lambda p: edit(p, lambda c: c.update(version=2)), "format version 2, .* reads version 1"),
}


def other_shard(content):
    here = content["parameters"]["scale"]["weight"]["file"]
    return next(file for file in content["files"] if file.startswith("weights") and file != here)


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_before_anything_is_written(two, case):
    path = two / "step-00000010"
    change, expected = DAMAGE[case]
    change(path)
    states = [FakeState(3), FakeState(3)]
    results = on_ranks(2, lambda peers: checkpoint.load(path, states[peers.rank], peers=peers))
    assert [type(result) for result in results] == [RunError, RunError], results
    assert str(results[0]) == str(results[1])
    assert re.search(expected, str(results[0])), results[0]
    assert str(path) in str(results[0])
    if case != "another version":
        assert f"step-00000005 is there: write that name into {two / 'latest'}" in str(results[0])
    if case != "entry elsewhere":
        assert states[0].same_as(FakeState(3))
        assert not states[0].writes
    with pytest.raises(RunError, match=expected):
        checkpoint.verify(path)
    checkpoint.verify(two / "step-00000005")


@pytest.mark.parametrize("position", range(0, 1200, 17))
def test_any_flipped_bit_of_the_manifest_is_found(two, position):
    flip(two / "step-00000010" / "manifest.json", position)
    with pytest.raises(RunError):
        checkpoint.verify(two / "step-00000010")


def test_the_weights_are_verified_too(two):
    flip(shard(two / "step-00000010"), -1)
    with pytest.raises(RunError, match="is damaged"):
        checkpoint.load_weights(two / "step-00000010")


def test_without_another_checkpoint_the_message_says_so(tmp_path):
    path = save(tmp_path, 1, FakeState())
    (path / "manifest.json").unlink()
    with pytest.raises(RunError, match="no other checkpoint is there"):
        checkpoint.verify(path)


def test_ranks_that_see_different_checkpoints(two, tmp_path):
    other = tmp_path / "elsewhere"
    save(other, 10, FakeState(4))
    paths = [two / "step-00000010", other / "step-00000010"]
    results = on_ranks(2, lambda peers: checkpoint.load(paths[peers.rank], FakeState(), peers=peers))
    assert all(isinstance(r, RunError) and "not the same file on all ranks" in str(r) for r in results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 128}, r"model\.hidden_size is 64 there and 128 here; model\.hidden_size=64, or another run"),
        ({"window": 32}, r"model\.window is null there and 32 here; model\.window=null"),
        ({"conv_kernel_sizes": (3, 2)}, r"model\.conv_kernel_sizes is \[2, 2\] there and \[3, 2\] here"),
        ({"attention": "gqa"}, r'model\.attention is "ccgqa" there and "gqa" here'),
    ],
)
def test_another_model_is_a_mistake_of_configuration(two, change, message):
    state = FakeState(3)
    model = ModelConfig.model_validate({**MODEL.model_dump(), **change})
    results = on_ranks(
        2, lambda peers: checkpoint.load(two / "step-00000010", state, expected_model=model, peers=peers)
    )
    assert [type(result) for result in results] == [ConfigError, ConfigError]
    assert re.search(message, str(results[0])), results[0]
    assert not state.writes


def test_the_same_model_written_differently_is_the_same(two):
    manifest = checkpoint.read_manifest(two / "step-00000010")
    compressed = ModelConfig(hidden_size=64, head_dim=16, query_compression=1, key_compression=2, vocab_size=100)
    checkpoint.check_same_model(manifest, compressed, two)
    checkpoint.check_same_model(manifest, MODEL.model_copy(update={"init_std": 0.1}), two)
    older = manifest.model_copy(update={"model": {k: v for k, v in manifest.model.items() if k != "rope_fraction"}})
    checkpoint.check_same_model(older, MODEL, two)
    newer = manifest.model_copy(update={"model": {**manifest.model, "gates": True}})
    with pytest.raises(ConfigError, match=r"model\.gates is true there and null here"):
        checkpoint.check_same_model(newer, MODEL, two)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (FakeState(shapes={"a.weight": (5, 3)}), r"has, and this model lacks, 4 parameters \(a\.bias, .*\.\.\.\)"),
        (FakeState(shapes={f"n{i}": (1,) for i in range(2)}), r"lacks 2 parameters \(n0, n1\)"),
        (FakeState(states=("momentum_buffer",)), "another optimizer: .* exp_avg, .* and this one momentum_buffer"),
        (FakeState(state_dtype=torch.bfloat16), r"exp_avg of a\.weight is float32 \[5, 3\] there and bfloat16"),
        (
            FakeState(shapes={"a.weight": (3, 5), "a.bias": (3,), "scale": (), "empty": (0, 4), "b.weight": (7, 11)}),
            r"weight of a\.weight is float32 \[5, 3\] there and float32 \[3, 5\] here",
        ),
    ],
)
def test_other_parameters_or_another_optimizer(two, state, message):
    with pytest.raises(ConfigError, match=message):
        checkpoint.load(two / "step-00000010", state)
    assert not state.writes


def test_another_tokenizer(two):
    with pytest.raises(ConfigError, match="another tokenizer"):
        checkpoint.load(two / "step-00000010", FakeState(), expected_tokenizer="cd" * 32)
    checkpoint.load(two / "step-00000010", FakeState(), expected_tokenizer="ab" * 32)
