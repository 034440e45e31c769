"""A checkpoint is complete or not there: kills and failing disks at every file operation of a save."""

import contextlib
import errno
import os
import shutil
import threading

import pytest

from hydra_dist.errors import RunError
from hydra_dist.train import checkpoint
from hydra_dist.train.checkpoint import files as checkpoint_files
from hydra_dist.train.checkpoint import writing as checkpoint_save
from tests.train.checkpoint_fakes import FakeState, load_latest, on_ranks, prepare_two, save


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


class Killed(BaseException):
    """Not an Exception: nothing may clean up after it, as after SIGKILL."""


OPERATIONS = ("write", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "open", "close")


def fail_at(monkeypatch, n, error, when=lambda *arguments: True):
    """Raise ``error`` in the n-th file operation from now on; counts them in the list that is returned."""
    calls = []

    def guard(name):
        original = getattr(os, name)

        def call(*arguments, **settings):
            if when(name, *arguments):
                calls.append(name)
                if len(calls) == n:
                    raise error
            return original(*arguments, **settings)

        monkeypatch.setattr(os, name, call)

    for name in OPERATIONS:
        guard(name)
    return calls


def operations_of(tmp_path, monkeypatch, action):
    with monkeypatch.context() as patch:
        calls = fail_at(patch, -1, None)
        action(tmp_path)
    return len(calls)


def prepare_none(root):
    root.mkdir(exist_ok=True)


def save_new(root):
    save(root, 15, FakeState(15))


def save_again(root):
    """The same step once more, from another state."""
    save(root, 10, FakeState(15))


def kill_everywhere(folder, monkeypatch, prepare, action):
    """Kill ``action`` at each of its file operations in turn: a whole checkpoint must be there, and the next save work.

    The steps of the checkpoints that were found afterwards.
    """
    prepare(folder / "count")
    count = operations_of(folder / "count", monkeypatch, action)
    assert count > 20
    seen = set()
    for n in range(1, count + 1):
        root = folder / str(n)
        prepare(root)
        with monkeypatch.context() as patch:
            fail_at(patch, n, Killed())
            with pytest.raises(Killed):
                action(root)
        if checkpoint.latest(root) is None:
            seen.add(None)
        else:
            loaded = load_latest(root)
            assert loaded.same_as(FakeState(loaded.step - 10))
            seen.add(loaded.step - 10)
        for name in checkpoint.complete_checkpoints(root):
            checkpoint.verify(root / name)
        save(root, 20, FakeState(20))
        assert load_latest(root).same_as(FakeState(20))
        assert not [path.name for path in root.iterdir() if "." in path.name], f"leftovers after a kill at {n}"
    return seen


@pytest.mark.parametrize(
    ("prepare", "action", "old"),
    [(prepare_two, save_new, 10), (prepare_two, save_again, 10), (prepare_none, save_new, None)],
)
def test_a_kill_between_any_two_file_operations(tmp_path, monkeypatch, prepare, action, old):
    assert kill_everywhere(tmp_path, monkeypatch, prepare, action) == {old, 15}


def name_first(partial, name):
    """``latest`` before the folder has its name."""
    checkpoint_files.replace_durably(partial.parent / "latest", name.encode())
    os.rename(partial, partial.parent / name)


def remove_first(partial, name):
    """The old checkpoint of the same step goes before the new one has its name."""
    shutil.rmtree(partial.parent / name, ignore_errors=True)
    os.rename(partial, partial.parent / name)
    checkpoint_files.replace_durably(partial.parent / "latest", name.encode())


@pytest.mark.parametrize(("publish", "action"), [(name_first, save_new), (remove_first, save_again)])
def test_the_check_above_rejects_another_order(tmp_path, monkeypatch, publish, action):
    monkeypatch.setattr(checkpoint_save, "publish", publish)
    with pytest.raises(RunError, match=r"which is not there|is missing"):
        kill_everywhere(tmp_path, monkeypatch, prepare_two, action)


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    rename = os.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(os, "rename", lambda old, new: (events.append("rename"), rename(old, new)))
    path = save(tmp_path, 15, FakeState(15))
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    partial = f"{path}.partial"
    assert {f"{partial}/{file.name}" for file in path.iterdir()} <= set(before)
    assert before[-1] == partial
    assert after == [str(tmp_path), f"{tmp_path}/latest.partial", str(tmp_path)]


@pytest.mark.parametrize(
    ("rank", "operation"),
    [(0, "write"), (0, "fsync"), (0, "open"), (0, "mkdir"), (0, "rename"), (1, "write"), (1, "fsync"), (1, "open")],
)
def test_a_full_disk_on_any_rank_is_one_error_on_all(two, monkeypatch, rank, operation):
    idents, error = {}, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def act(peers):
        idents[threading.get_ident()] = peers.rank
        return save(two, 15, FakeState(15), peers=peers)

    calls = fail_at(
        monkeypatch, 1, error, lambda name, *a: name == operation and idents.get(threading.get_ident()) == rank
    )
    results = on_ranks(2, act)
    monkeypatch.undo()
    assert calls
    assert [type(result) for result in results] == [RunError, RunError]
    assert str(results[0]) == str(results[1])
    message = str(results[0])
    assert f"No space left on device (rank {rank})" in message
    assert "checkpoint step-00000015" in message
    assert "GiB: free that much, or lower checkpoint.keep" in message
    assert "step-00000005, step-00000010" in message
    assert load_latest(two).step in (20, 25)
    assert not list(two.glob("*.partial/*"))
    save(two, 15, FakeState(15))
    assert load_latest(two).same_as(FakeState(15))


def test_every_single_failing_operation_leaves_a_good_checkpoint(tmp_path, monkeypatch):
    prepare_two(tmp_path / "count")
    count = operations_of(tmp_path / "count", monkeypatch, save_again)
    for n in range(1, count + 1):
        root = tmp_path / str(n)
        prepare_two(root)
        with monkeypatch.context() as patch:
            fail_at(patch, n, OSError(errno.EIO, os.strerror(errno.EIO)))
            with contextlib.suppress(RunError):  # a failing removal of the oldest is no error
                save_again(root)
        loaded = load_latest(root)
        assert loaded.same_as(FakeState(loaded.step - 10))


def test_a_folder_that_cannot_be_written(tmp_path):
    root = tmp_path / "checkpoints"
    root.write_text("a file in the way")
    with pytest.raises(RunError, match=r"checkpoint step-00000001 could not be finished: .*there is no other one"):
        save(root, 1, FakeState())


def test_a_shard_that_the_first_rank_cannot_see(two, monkeypatch):
    """As when each node writes to a disk of its own."""
    original = checkpoint_files.ShardWriter.finish

    def lose(writer):
        digest = original(writer)
        if "00001-of" in writer._path.name:
            os.unlink(writer._path)
        return digest

    monkeypatch.setattr(checkpoint_files.ShardWriter, "finish", lose)
    results = on_ranks(2, lambda peers: save(two, 15, FakeState(15), peers=peers))
    assert all(isinstance(result, RunError) and "shared storage" in str(result) for result in results)
    assert load_latest(two).step == 20
