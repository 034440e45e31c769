"""Checkpoints on disk: what is written, by how many ranks, which one is the latest and which ones stay."""

import errno
import json
import os
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from hydra_dist.errors import RunError
from hydra_dist.train import checkpoint
from hydra_dist.train.checkpoint import files as checkpoint_files
from hydra_dist.train.checkpoint import folder as checkpoint_folder
from hydra_dist.train.checkpoint.state import deal
from tests.train.checkpoint_fakes import METADATA, FakeState, load_latest, on_ranks, prepare_two, save


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


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_what_any_number_of_ranks_saves_any_number_loads(tmp_path, size):
    saved = FakeState(1)
    paths = on_ranks(size, lambda peers: save(tmp_path, 100, saved, peers=peers))
    assert paths == [tmp_path / "step-00000100"] * size
    assert checkpoint.latest(tmp_path) == paths[0]
    loaded = [FakeState(2) for _ in range(3)]
    manifests = on_ranks(3, lambda peers: checkpoint.load(paths[0], loaded[peers.rank], peers=peers))
    assert all(state.same_as(saved) and state.prepared for state in loaded)
    assert manifests[0].world_size == size
    assert len(list(paths[0].glob("weights-*"))) == min(size, len(saved.names))


def test_the_layout_is_plain_safetensors_and_json(tmp_path):
    saved = FakeState(1)
    path = save(tmp_path, 100, saved)
    names = sorted(file.name for file in path.iterdir())
    assert names == ["manifest.json", "optimizer-00000-of-00001.safetensors", "weights-00000-of-00001.safetensors"]
    assert (tmp_path / "latest").read_text() == "step-00000100\n"
    weights = load_file(path / names[2])
    assert set(weights) == set(saved.names)
    assert all(torch.equal(weights[name], saved.tensors[name]["weight"]) for name in saved.names)
    moments = load_file(path / names[1])
    assert torch.equal(moments["b.weight/exp_avg_sq"], saved.tensors["b.weight"]["exp_avg_sq"])
    manifest = json.loads((path / "manifest.json").read_text())
    entry = {"file": names[1], "shape": [7, 11], "dtype": "float32"}
    assert manifest["parameters"]["b.weight"]["exp_avg"] == entry
    assert (manifest["step"], manifest["data_step"], manifest["optimizer_step"]) == (100, 7, 11)
    assert manifest["extra"] == {"skipped": [3, 4]}
    assert set(manifest["versions"]) >= {"hydra_dist", "torch", "python"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.uint8])
def test_states_of_other_dtypes_keep_their_bits(tmp_path, dtype):
    saved, loaded = FakeState(1, state_dtype=dtype), FakeState(2, state_dtype=dtype)
    checkpoint.load(save(tmp_path, 1, saved), loaded)
    for name in saved.names:
        for key in saved.keys(name):
            before, after = (s.tensors[name][key].reshape(-1).view(torch.uint8) for s in (saved, loaded))
            assert torch.equal(before, after)


def test_tensors_are_written_in_parts_that_the_library_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "BYTES_AT_ONCE", 7)
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:3]))
    saved = FakeState(1)
    save(tmp_path, 1, saved)
    monkeypatch.undo()
    assert load_latest(tmp_path).same_as(saved)


def test_a_shard_refuses_what_was_not_announced(tmp_path):
    info = checkpoint_files.TensorInfo
    with pytest.raises(ValueError, match="wide to narrow"):
        checkpoint_files.ShardWriter(tmp_path / "x", [info("a", torch.uint8, (1,)), info("b", torch.float32, (1,))])
    with checkpoint_files.ShardWriter(tmp_path / "x", [info("a", torch.float32, (2,))]) as writer:
        with pytest.raises(ValueError, match="expected"):
            writer.write(torch.zeros(3))
        with pytest.raises(ValueError, match="not written"):
            writer.finish()


def test_weights_alone(two):
    weights = checkpoint.load_weights(two / "step-00000010")
    expected = FakeState(10).tensors
    assert list(weights) == list(expected)
    assert all(torch.equal(weights[name], expected[name]["weight"]) for name in expected)


def test_a_checkpoint_before_the_first_step_has_weights_only(tmp_path):
    saved, loaded = FakeState(1, states=()), FakeState(2)
    saved.step = 0
    path = save(tmp_path, 0, saved)
    checkpoint.load(path, loaded)
    assert loaded.step == 0
    assert torch.equal(loaded.tensors["b.weight"]["weight"], saved.tensors["b.weight"]["weight"])


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 6))
def test_parameters_are_dealt_evenly(sizes, ranks):
    named = {str(i): size for i, size in enumerate(sizes)}
    dealt = deal(named, ranks)
    assert sorted(name for names in dealt for name in names) == sorted(named)
    loads = [sum(named[name] for name in names) for names in dealt]
    assert max(loads) - min(loads) <= max(sizes, default=0)


@pytest.mark.parametrize(("keep", "left"), [(1, [40]), (2, [30, 40]), (3, [20, 30, 40]), (9, [10, 20, 30, 40])])
def test_keep(tmp_path, keep, left):
    for step in (10, 20, 30, 40):
        save(tmp_path, step, FakeState(), keep=keep)
    assert checkpoint.complete_checkpoints(tmp_path) == [f"step-{step:08d}" for step in left]


def test_a_run_set_back_keeps_newer_checkpoints_until_it_passes_them(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, FakeState(step), keep=3)
    (tmp_path / "latest").write_text("step-00000010\n")
    save(tmp_path, 15, FakeState(15), keep=1)
    assert checkpoint.complete_checkpoints(tmp_path) == [f"step-{step:08d}" for step in (15, 20, 30)]
    assert load_latest(tmp_path).same_as(FakeState(15))
    save(tmp_path, 20, FakeState(21), keep=1)
    assert load_latest(tmp_path).same_as(FakeState(21))


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(two, monkeypatch, caplog):
    def refuse(path, *arguments, **settings):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    save(two, 15, FakeState(15), keep=2)
    assert "step-00000005: the old checkpoint could not be removed: Permission denied" in caplog.text
    assert load_latest(two).same_as(FakeState(15))


def test_latest(tmp_path):
    assert checkpoint.latest(tmp_path / "missing") is None
    assert checkpoint.latest(tmp_path) is None
    prepare_two(tmp_path)
    (tmp_path / "latest").write_text("step-00000005")
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000005"
    (tmp_path / "latest").unlink()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000010"


@pytest.mark.parametrize("text", ["", "../../etc", "step-00000011", "step-00000010.partial", "step-5", b"\xff\xfe\x00"])
def test_a_latest_that_names_nothing(two, text):
    (two / "latest").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RunError, match=r"latest .*step-00000010 is there: write that name into .*latest"):
        checkpoint.latest(two)


def test_metadata_with_an_unknown_or_missing_key_is_our_bug(tmp_path):
    with pytest.raises(ValueError, match="colour"):
        checkpoint.save(tmp_path, 1, FakeState(), metadata={**METADATA, "colour": "red"})
    with pytest.raises(ValueError, match="precision"):
        checkpoint.save(tmp_path, 1, FakeState(), metadata={k: v for k, v in METADATA.items() if k != "precision"})
    assert checkpoint.latest(tmp_path) is None


def test_names():
    assert checkpoint_folder.checkpoint_name(100) == "step-00000100"
    assert checkpoint_folder.checkpoint_name(10**9) == "step-1000000000"
