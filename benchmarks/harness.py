"""How things are timed: alternatives in turns in one process, per-round ratios, and a record of how quiet it was.

Two programs timed one after the other differ by whatever the machine did in between. Alternatives that run in turns,
each second round in the opposite order (A B B A ...), meet the same conditions, and a ratio within one round is free
of what drifts over the rounds.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.machine import available_cores
from benchmarks.result import Conditions, Samples, Setting

CALIBRATION_ROUNDS = 15
CALIBRATION_ADDITIONS = 200_000
QUIET_VARIATION = 0.05
"""Interquartile range over median of the calibration loop, above which others take part of the processor."""
QUIET_LOAD_PER_CORE = 0.5

Timer = Callable[[Callable[[], object]], float]
"""Runs a function once; the seconds it took."""


@dataclass(frozen=True)
class Options:
    """What a benchmark's ``run`` is given."""

    device: str
    """``cpu`` or ``cuda``."""
    settings: Mapping[str, Setting]
    """The module's ``SETTINGS``, with what ``--set`` changed."""
    say: Callable[[str], None] = print
    """Tells a person how far it is."""


@dataclass(frozen=True)
class Comparison:
    """What ``interleaved`` measured."""

    seconds: dict[str, Samples]
    ratios: dict[str, Samples]
    """Each alternative after the first, over the first, round by round: below 1 is faster."""
    order: tuple[str, ...]
    """The names as they were timed."""


def interleaved(
    pairs: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1, timer: Timer | None = None
) -> Comparison:
    """Time alternatives in turns: A B, B A, A B, ...

    Args:
        pairs: name to function; the first is what the others are compared with. Two or more.
        rounds: how often each is timed; an even number gives each place as often to each.
        warmup: how often each runs untimed first.
        timer: ``wall_seconds`` by default; ``cuda_seconds`` for work on a GPU.

    Raises ValueError for fewer than two alternatives or no round.
    """
    if len(pairs) < 2 or rounds < 1 or warmup < 0:
        raise ValueError(f"{len(pairs)} alternatives, {rounds} rounds, {warmup} warm-ups")
    timer = timer or wall_seconds
    names = list(pairs)
    for _ in range(warmup):
        for name in names:
            timer(pairs[name])
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order: list[str] = []
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            seconds[name].append(timer(pairs[name]))
            order.append(name)
    first = seconds[names[0]]
    ratios = {
        name: Samples.of([b / a for a, b in zip(first, seconds[name], strict=True)], unit="1") for name in names[1:]
    }
    return Comparison({name: Samples.of(taken, unit="s") for name, taken in seconds.items()}, ratios, tuple(order))


def wall_seconds(function: Callable[[], object]) -> float:
    """Seconds of one call by the wall clock."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def cuda_seconds(function: Callable[[], object]) -> float:
    """Seconds of one call's work on the current stream, between two CUDA events; earlier work is waited for first."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def quiet() -> Conditions:
    """How busy the machine is now: its load, and how much a fixed loop varies. Takes about a tenth of a second."""
    samples = Samples.of([wall_seconds(_calibration_loop) for _ in range(CALIBRATION_ROUNDS)], unit="s")
    variation = samples.interquartile_range / samples.median
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    return Conditions(
        load_average=load,
        calibration=samples,
        variation=variation,
        quiet=variation < QUIET_VARIATION and (load is None or load[0] < QUIET_LOAD_PER_CORE * available_cores()),
    )


def _calibration_loop() -> int:
    total = 0
    for number in range(CALIBRATION_ADDITIONS):
        total += number
    return total
