"""Attention over real processes gives the bits that emulated ranks give."""

import importlib.util
from pathlib import Path

import pytest
import torch

from hydra_dist.context import run_ranks

WORKER = Path(__file__).with_name("ring_worker.py")


def load_worker():
    spec = importlib.util.spec_from_file_location("ring_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    return worker


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_and_threads_agree_to_the_bit(ranks, torchrun, tmp_path):
    finished = torchrun(ranks, str(WORKER), str(tmp_path), timeout=150)
    assert finished.returncode == 0, finished.stderr
    emulated = run_ranks(ranks, load_worker().everything)
    for rank, wanted in enumerate(emulated):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert value.dtype == found[name].dtype
            assert torch.equal(value, found[name]), f"rank {rank}: {name}"
    silent = (tmp_path / "silent.txt").read_text()
    assert silent.startswith(f"TransportTimeoutError: context rank 0 of {ranks} (global rank 0): forward test with")
    assert "context rank 1 (global rank 1) failed" in silent
