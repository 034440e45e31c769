"""A record to write and read."""

from collections.abc import Callable

import pytest

from benchmarks.result import Commit, Conditions, Machine, Record, Result, Samples, Table


@pytest.fixture
def make_record() -> Callable[..., Record]:
    """``make_record(name="speed", device="cpu", rows=("all",))``."""
    return _make_record


def _make_record(name: str = "speed", device: str = "cpu", rows: tuple[str, ...] = ("all",)) -> Record:
    """A record with a value in every field."""
    conditions = Conditions(
        load_average=(0.1, 0.2, 0.3), calibration=Samples.of([1.0, 1.01], "s"), variation=0.005, quiet=True
    )
    return Record(
        name=name,
        claim="It is fast.",
        device=device,
        settings={"steps": 3, "rate": 0.5, "config": "a.yaml", "deep": True},
        machine=Machine(processor="P", cores=2, memory_gib=8.0, gpus=(), gpu_driver=None, system="S"),
        versions={"python": "3.12.1", "deepspeed": None},
        commit=Commit(hash="abc", dirty=False),
        date="2026-11-20T20:00:00+00:00",
        seconds=1.5,
        conditions=(conditions, conditions),
        result=Result(
            holds=True,
            finding="0.5 times",
            quantities={"ratio": Samples.of([0.4, 0.5, 0.9], "1")},
            counts={"bytes": 7},
            table=Table(columns=("tokens", "ratio"), rows=((8192, 0.123456), (16384, 2.0))),
            rows=rows,
        ),
    )
