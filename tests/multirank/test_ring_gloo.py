"""Attention over real processes gives the bits that emulated ranks give."""

import importlib.util
from pathlib import Path

import pytest
import torch

from hydra_dist.context import run_ranks

PATH = Path(__file__).with_name("ring_worker.py")
RANKS = 4


def load_worker():
    spec = importlib.util.spec_from_file_location("ring_worker", PATH)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    return worker


WORKER = load_worker()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture
def finished(folder, torchrun):
    """The folder with what the processes saved; they run once for all tests here."""
    if not any(folder.iterdir()):
        done = torchrun(RANKS, str(PATH), str(folder), timeout=300)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("grid", list(WORKER.GRIDS), ids=str)
def test_processes_and_threads_agree_to_the_bit(grid, finished):
    emulated = run_ranks(grid, lambda mesh: WORKER.everything(mesh, grid))
    for rank in range(RANKS):
        wanted = emulated[rank % len(emulated)]  # the same in all replicas
        found = torch.load(finished / f"{grid[0]}x{grid[1]} rank{rank}.pt", weights_only=True)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert value.dtype == found[name].dtype
            assert torch.equal(value, found[name]), f"rank {rank}: {name}"


def test_the_comparison_tells_strategies_apart():
    """Bits differ between strategies that merge in another order, so that equal bits are no matter of course."""
    found = run_ranks((4, 1), lambda mesh: WORKER.everything(mesh, (4, 1)))[3]
    name = f"causal {torch.float32} out"
    assert not torch.equal(found[f"ring striped {name}"], found[f"all_gather striped {name}"])


@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
def test_a_rank_that_never_sends_is_named_within_the_time(strategy, finished):
    texts = [(finished / f"silent {strategy} rank{rank}.txt").read_text(encoding="utf-8") for rank in range(RANKS)]
    assert texts[1] == ""
    for rank in (0, 2, 3):
        seconds, message = texts[rank].split(" ", 1)
        assert message.startswith(
            f"TransportTimeoutError: context rank {rank} of 4 (global rank {rank}): forward keys with context rank "
        ), message
        assert "(global rank" in message.split("with", 1)[1]
        assert float(seconds) < 10
    # Its neighbours in the ring, and all that gather, wait for rank 1 itself.
    for rank in (2,) if strategy == "ring" else (0, 2, 3):
        assert "1 (global rank 1)" in texts[rank].split("with", 1)[1]
