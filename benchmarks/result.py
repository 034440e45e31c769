"""The file a benchmark leaves behind: raw samples, what they say, and the machine and commit they were taken on.

One schema for every benchmark. The statistics stand beside the raw samples for a reader without tools; reading a file
computes them again and refuses one in which they do not agree.
"""

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from hydra_dist.config.types import Section
from hydra_dist.errors import RunError

SCHEMA_VERSION = 1

Finite = Annotated[float, Field(allow_inf_nan=False)]
Cell = str | int | Finite
Setting = bool | int | float | str


class Samples(Section):
    """All samples of one quantity, in the order in which they were taken. Make one with ``Samples.of``."""

    unit: str
    """Such as ``s``, ``bytes``, ``bits per byte``; ``1`` for a ratio."""
    raw: Annotated[tuple[Finite, ...], Field(min_length=1)]
    median: Finite
    minimum: Finite
    maximum: Finite
    lower_quartile: Finite
    upper_quartile: Finite

    @classmethod
    def of(cls, raw: Sequence[float], unit: str) -> "Samples":
        """Samples with their median and spread. ValueError where there is none, or one that is not finite."""
        values = tuple(float(value) for value in raw)
        return cls(unit=unit, raw=values, **_statistics(values))

    @property
    def interquartile_range(self) -> float:
        """Width of the middle half of the samples."""
        return self.upper_quartile - self.lower_quartile

    @model_validator(mode="after")
    def _agree(self) -> "Samples":
        for name, value in _statistics(self.raw).items():
            if abs(getattr(self, name) - value) > 1e-9 * max(1.0, abs(value)):
                raise ValueError(f"{name} is {getattr(self, name)}, but the raw samples give {value}")
        return self


class Table(Section):
    """What the README shows."""

    columns: Annotated[tuple[str, ...], Field(min_length=1)]
    rows: tuple[tuple[Cell, ...], ...]

    @model_validator(mode="after")
    def _rectangular(self) -> "Table":
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row of {len(row)} cells under {len(self.columns)} columns: {row}")
        return self

    def markdown(self) -> str:
        """The table in Markdown; numbers with four significant digits, integers whole."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


class Result(Section):
    """What ``run`` of a benchmark gives back."""

    holds: bool
    """Whether the claim holds on these samples."""
    finding: str
    """One sentence with the numbers that decide."""
    quantities: dict[str, Samples]
    counts: dict[str, int] = Field(default_factory=dict)
    """Exact numbers, such as bytes sent or tensors alive: no spread."""
    table: Table
    rows: tuple[str, ...] = ("all",)
    """Which of the benchmark's rows this run measured, by the names it has in ``pending.json``."""


class Conditions(Section):
    """How quiet the machine was around the measurement."""

    load_average: tuple[Finite, Finite, Finite] | None
    """Runnable processes over 1, 5 and 15 minutes; None where the system does not say."""
    calibration: Samples
    """Seconds of a fixed loop, repeated."""
    variation: Finite
    """Interquartile range over median of the calibration."""
    quiet: bool


class Machine(Section):
    """Where it was measured."""

    processor: str
    cores: int
    """That this process may use."""
    memory_gib: Finite
    gpus: tuple[str, ...]
    gpu_driver: str | None
    system: str


class Commit(Section):
    """What was measured."""

    hash: str
    dirty: bool
    """Whether files other than results differed from the commit."""


class Record(Section):
    """One file in ``results/``."""

    schema_version: Literal[1] = 1
    name: str
    claim: str
    """The benchmark's docstring."""
    device: str
    """``cpu``, or the GPU's name as it stands in the file's name."""
    settings: dict[str, Setting]
    machine: Machine
    versions: dict[str, str | None]
    """Of Python and of libraries; None where one is not installed."""
    commit: Commit | None
    """None outside a git checkout."""
    date: str
    """UTC, ISO 8601."""
    seconds: Finite
    """How long the whole benchmark took."""
    conditions: tuple[Conditions, Conditions]
    """Before and after."""
    result: Result

    @property
    def file_name(self) -> str:
        """``NAME.json``, or ``NAME-DEVICE.json`` for a GPU."""
        return f"{self.name}.json" if self.device == "cpu" else f"{self.name}-{self.device}.json"


def write_record(record: Record, directory: Path) -> Path:
    """Write ``record`` into ``directory``, whole or not at all; its path."""
    path = directory / record.file_name
    write_atomically(path, record.model_dump_json(indent=2) + "\n")
    return path


def read_record(path: Path) -> Record:
    """A result file. RunError where it is missing, no JSON, of another schema, or contradicts itself."""
    try:
        return Record.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RunError(f"{path}: not a result of schema version {SCHEMA_VERSION}: {place}: {first['msg']}") from None


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` so that a reader sees the old file or the new one. RunError where that fails."""
    written = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(written, path)
    except OSError as error:
        written.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None


def to_json(value: object) -> str:
    """Indented JSON with a final newline."""
    return json.dumps(value, indent=2) + "\n"


def _statistics(values: Sequence[float]) -> dict[str, float]:
    if not values:
        raise ValueError("no samples")
    ordered = sorted(values)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {
        "median": statistics.median(ordered),
        "minimum": ordered[0],
        "maximum": ordered[-1],
        "lower_quartile": quartiles[0],
        "upper_quartile": quartiles[2],
    }


def _cell(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return f"{cell:,}" if isinstance(cell, int) else cell
