"""Processes that a benchmark starts: what they are told, what comes back, and that none is left."""

import os
import time

import psutil
import pytest

from benchmarks import ranks
from benchmarks.ranks import Place, measure
from hydra_dist.errors import RunError

REPORTS = """
import json, os, sys
if os.environ["RANK"] == "0":
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "MARK")
    found = {"settings": json.loads(sys.argv[1]), **{name: os.environ.get(name) for name in names}}
    open(sys.argv[2], "w").write(json.dumps(found))
"""
FAILS = """
import os, sys, time
if os.environ["RANK"] == "1":
    sys.exit("the link is gone")
open(os.environ["PID_FILE"], "w").write(str(os.getpid()))
time.sleep(60)
"""


@pytest.fixture
def place(tmp_path):
    """A place in which the modules ``reports`` and ``fails`` are found."""
    (tmp_path / "reports.py").write_text(REPORTS)
    (tmp_path / "fails.py").write_text(FAILS)
    return Place(environment={"PYTHONPATH": str(tmp_path), "PID_FILE": str(tmp_path / "pid")})


def test_ranks_know_their_group_and_rank_0_reports(place):
    marked = Place(("env", "MARK=here"), place.environment)
    found = measure("reports", {"rounds": 3, "heads": [8, 2]}, [marked, place], "127.0.0.1", 60)
    assert found == {
        "settings": {"rounds": 3, "heads": [8, 2]},
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "MARK": "here",
    }


def test_a_rank_that_fails_is_told_and_ends_the_others(place, tmp_path):
    started = time.monotonic()
    with pytest.raises(RunError, match=r"fails: rank 1 of 2 ended with exit code 1:\nthe link is gone"):
        measure("fails", {}, [place] * 2, "127.0.0.1", 60)
    assert time.monotonic() - started < 30
    pid = tmp_path / "pid"
    assert not pid.exists() or not psutil.pid_exists(int(pid.read_text()))


def test_time_runs_out(place, tmp_path):
    with pytest.raises(RunError, match=r"fails: not done after 1 s"):
        measure("fails", {}, [place], "127.0.0.1", 1.0)
    pid = tmp_path / "pid"
    assert not pid.exists() or not psutil.pid_exists(int(pid.read_text()))


def test_an_interrupt_leaves_no_process(place, tmp_path, monkeypatch):
    pid = tmp_path / "pid"

    def interrupted(processes, timeout):
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.02)
        raise KeyboardInterrupt

    monkeypatch.setattr(ranks, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure("fails", {}, [place], "127.0.0.1", 60)
    assert not psutil.pid_exists(int(pid.read_text()))
    assert psutil.pid_exists(os.getpid())
