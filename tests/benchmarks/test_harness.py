"""Turns, ratios and quietness."""

import pytest

from benchmarks import harness
from benchmarks.harness import Comparison, cuda_seconds, interleaved, quiet, wall_seconds


def compare(
    names: str, rounds: int, warmup: int = 0, seconds: dict[str, float] | None = None
) -> tuple[str, Comparison]:
    """Run ``interleaved`` over functions that note their name, on a clock that gives each its own time."""
    calls: list[str] = []
    costs = seconds or {}

    def timer(function):
        function()
        return costs.get(calls[-1], 1.0)

    found = interleaved({name: lambda name=name: calls.append(name) for name in names}, rounds, warmup, timer)
    return "".join(calls), found


@pytest.mark.parametrize(
    ("names", "rounds", "calls"), [("AB", 4, "ABBAABBA"), ("AB", 1, "AB"), ("ABC", 2, "ABCCBA"), ("AB", 3, "ABBAAB")]
)
def test_alternatives_take_turns(names, rounds, calls):
    called, found = compare(names, rounds)
    assert called == calls == "".join(found.order)


def test_warm_up_runs_are_not_samples():
    called, found = compare("AB", rounds=2, warmup=3)
    assert called == "ABABAB" + "ABBA"
    assert len(found.seconds["A"].raw) == len(found.seconds["B"].raw) == 2


def test_ratios_are_over_the_first_round_by_round():
    _, found = compare("ABC", rounds=3, seconds={"A": 2.0, "B": 1.0, "C": 5.0})
    assert found.ratios["B"].raw == (0.5, 0.5, 0.5)
    assert found.ratios["C"].median == 2.5
    assert set(found.ratios) == {"B", "C"}
    assert found.seconds["A"].unit == "s"
    assert found.ratios["B"].unit == "1"


def test_a_drifting_machine_moves_the_seconds_and_not_the_ratio():
    """B costs 1.5 A while everything slows down by 1 % a call; timing A's runs before B's would be fooled."""
    clock = {"now": 1.0}

    def timer(function):
        clock["now"] *= 1.01
        return function() * clock["now"]

    found = interleaved({"A": lambda: 1.0, "B": lambda: 1.5}, rounds=40, warmup=0, timer=timer)
    assert found.ratios["B"].median == pytest.approx(1.5, rel=0.011)
    clock["now"] = 1.0
    one_after_the_other = [[timer(lambda cost=cost: cost) for _ in range(40)] for cost in (1.0, 1.5)]
    assert sum(one_after_the_other[1]) / sum(one_after_the_other[0]) > 2


@pytest.mark.parametrize(("names", "rounds", "warmup"), [("A", 3, 0), ("", 3, 0), ("AB", 0, 0), ("AB", 1, -1)])
def test_what_gives_no_ratio_is_refused(names, rounds, warmup):
    with pytest.raises(ValueError, match="alternatives"):
        compare(names, rounds, warmup)


def test_wall_seconds_waits_for_the_function():
    import time

    assert 0.02 <= wall_seconds(lambda: time.sleep(0.02)) < 1


def test_cuda_seconds_brackets_the_work_with_events(monkeypatch):
    """Without a GPU: the order of calls, on a stand-in for torch.cuda."""
    import torch

    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")

        def elapsed_time(self, end):
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    assert cuda_seconds(lambda: calls.append("work")) == 0.25
    assert calls == ["synchronize", "record", "work", "record", "synchronize"]


@pytest.mark.parametrize(
    ("seconds", "load", "is_quiet"),
    [
        ([1.0] * 15, 0.1, True),
        ([1.0, 1.3] * 7 + [1.0], 0.1, False),
        ([1.0] * 15, 1.9, False),
        ([1.0] * 14 + [9.0], 0.1, True),
    ],
)
def test_quiet_is_a_low_load_and_an_even_loop(monkeypatch, seconds, load, is_quiet):
    """One outlier of fifteen is no busy machine; two speeds in turn are one, and so is a load of a core or more."""
    left = iter(seconds)
    monkeypatch.setattr(harness, "wall_seconds", lambda function: next(left))
    monkeypatch.setattr(harness, "available_cores", lambda: 2)
    monkeypatch.setattr(harness.os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert quiet().quiet is is_quiet


def test_quiet_really_measures():
    found = quiet()
    assert found.calibration.minimum > 0
    assert found.variation == pytest.approx(found.calibration.interquartile_range / found.calibration.median)
