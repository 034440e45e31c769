"""Estimates against published measurements: how far off, row by row, and over all rows.

A row is one run of one configuration on one kind of GPU, with the bytes its authors recorded. Rows and the reasons for
those left out are in ``cases``. A slope is the difference between two rows that isolates one component: what both rows
share, estimated or not, is gone from it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hydra_dist.memory.deepspeed_hf import Limit, Longest, estimate_deepspeed, limit_of, solve_longest
from hydra_dist.memory.deepspeed_hf_settings import GPU_BYTES, DeepSpeedSettings
from hydra_dist.memory.megatron import estimate_stages
from hydra_dist.memory.megatron_arguments import read_arguments
from hydra_dist.memory.result import NodeMemory, RankMemory
from hydra_dist.memory.shapes import DenseDecoder

CASES = Path(__file__).parent / "cases"
MEASURES = ("steady", "first_peak", "peak")
METRICS = ("allocated", "reserved", "device")
"""Measures of rows of DeepSpeed, each compared with its own."""
OVERRIDES = ("attention", "cublas_workspace", "cross_entropy")
"""Settings that a row may name because the options leave them to the libraries of its time."""
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """A published measurement and its estimate."""

    name: str
    measured: Mapping[str, int]
    """Bytes, by measure: allocated between steps, in the first step and at the peak; or peaks by metric."""
    estimate: RankMemory | NodeMemory

    def error(self, measure: str = "peak") -> float:
        """Estimated over measured, less 1."""
        return getattr(self.estimate, measure) / self.measured[measure] - 1


@dataclass(frozen=True)
class Slope:
    """The difference between two measurements that isolates one component."""

    name: str
    measured: int
    estimated: int

    @property
    def error(self) -> float:
        return self.estimated / self.measured - 1


@dataclass(frozen=True)
class Summary:
    """Of the absolute errors of all rows that have the measure."""

    measure: str
    rows: int
    median: float
    ninetieth: float
    worst: tuple[Row, ...]
    """Furthest off first."""


def load_rows(name: str = "megatron_gpt") -> tuple[Row, ...]:
    """Rows of one file of published measurements, each with its estimate."""
    document = json.loads((CASES / f"{name}.json").read_text(encoding="utf-8"))
    last = document["rank"] == "last"
    return tuple(
        Row(
            name=row["name"],
            measured={measure: row[measure] for measure in MEASURES if measure in row},
            estimate=_estimate(configuration["arguments"], row, last),
        )
        for configuration in document["configurations"]
        for row in configuration["rows"]
    )


def _estimate(arguments: Mapping[str, Any], row: Mapping[str, Any], last: bool) -> RankMemory:
    overrides = {name: row[name] for name in OVERRIDES if name in row}
    stages = estimate_stages(*read_arguments(arguments, row["gpus"], row["gpu"], **overrides))
    return stages[-1] if last else max(stages, key=lambda stage: stage.peak)


@dataclass(frozen=True)
class Bound:
    """The longest sequence that others ran, and the longest that is estimated to fit."""

    name: str
    published: int
    """Tokens."""
    tight: bool
    """The source says that more does not fit; otherwise it says that this much ran."""
    limit: Limit | None
    """What the source says was short."""
    solved: Longest

    @property
    def error(self) -> float:
        return self.solved.sequence_length / self.published - 1


def load_deepspeed(name: str = "deepspeed_hf") -> tuple[Row, ...]:
    """Measured memory of DeepSpeed's runs, with estimates."""
    document = _document(name)
    return tuple(
        Row(
            name=row["name"],
            measured={metric: row[metric] for metric in METRICS if metric in row},
            estimate=estimate_deepspeed(_model(document, row), DeepSpeedSettings(**row["settings"])),
        )
        for row in document["rows"]
    )


def load_bounds(name: str = "deepspeed_hf") -> tuple[Bound, ...]:
    """Published longest sequences, with those that the estimate finds."""
    document = _document(name)
    return tuple(
        Bound(
            name=row["name"],
            published=row["sequence_length"],
            tight=row["tight"],
            limit=row.get("limit"),
            solved=solve_longest(
                _model(document, row),
                DeepSpeedSettings(sequence_length=1, **row["settings"]),
                GPU_BYTES[row["gpu"]],
                document["host"],
            ),
        )
        for row in document["longest"]
    )


def load_failures(name: str = "deepspeed_hf") -> dict[str, tuple[Limit, Limit | None]]:
    """Of runs that did not fit: what the source says was short, and what the estimate says."""
    document = _document(name)
    found = {}
    for row in document["fails"]:
        model, settings = _model(document, row), DeepSpeedSettings(**row["settings"])
        memory = estimate_deepspeed(model, settings)
        short = limit_of(memory, settings, model, GPU_BYTES[row["gpu"]], document["host"])
        found[row["name"]] = (row["limit"], short)
    return found


def _document(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((CASES / f"{name}.json").read_text(encoding="utf-8"))
    return document


def _model(document: Mapping[str, Any], row: Mapping[str, Any]) -> DenseDecoder:
    return DenseDecoder(**document["models"][row["model"]])


def summarize(rows: Iterable[Row], measure: str = "peak", worst: int = 10) -> Summary:
    """Median, 90th percentile (nearest rank) and the rows that are furthest off."""
    ordered = sorted((row for row in rows if measure in row.measured), key=lambda row: abs(row.error(measure)))
    if not ordered:
        raise ValueError(f"no row has {measure}")
    errors = [abs(row.error(measure)) for row in ordered]
    return Summary(
        measure=measure,
        rows=len(ordered),
        median=median(errors),
        ninetieth=errors[-(-9 * len(errors) // 10) - 1],
        worst=tuple(reversed(ordered[-worst:])),
    )


def load_slopes(rows: Iterable[Row], name: str = "megatron_slopes") -> tuple[Slope, ...]:
    """Differences that a file names, over ``rows``."""
    by_name = {row.name: row for row in rows}
    document = json.loads((CASES / f"{name}.json").read_text(encoding="utf-8"))
    return tuple(
        _slope(entry["what"], by_name[entry["less"]], by_name[entry["more"]], entry.get("measure", "peak"))
        for entry in document["slopes"]
    )


def _slope(what: str, less: Row, more: Row, measure: str) -> Slope:
    estimated = getattr(more.estimate, measure) - getattr(less.estimate, measure)
    return Slope(what, more.measured[measure] - less.measured[measure], estimated)


def growth_slopes(rows: Iterable[Row]) -> tuple[Slope, ...]:
    """What the second step adds to the first one's peak, where the first step's end does not hide a part of it."""
    return tuple(
        Slope(row.name, row.measured["peak"] - row.measured["first_peak"], row.estimate.late)
        for row in rows
        if {"first_peak", "peak"} <= row.measured.keys()
        and isinstance(row.estimate, RankMemory)
        and row.estimate.first_peak == row.estimate.peak - row.estimate.late
        and row.measured["peak"] > row.measured["first_peak"]
    )


def table(summary: Summary) -> str:
    """One line for all rows and one for each of the worst, as text."""
    metric = summary.measure + (", allocated" if summary.measure in MEASURES else "")
    lines = [
        f"{metric}: {summary.rows} rows, median error {summary.median:.2%}, 90th percentile {summary.ninetieth:.2%}"
    ]
    for row in summary.worst:
        measured, estimated = row.measured[summary.measure], getattr(row.estimate, summary.measure)
        lines.append(
            f"{row.error(summary.measure):+8.2%}  {measured / GIB:7.3f} GiB measured  {estimated / GIB:7.3f} GiB "
            f"estimated  {row.estimate.limiting.name:8}  {row.name}"
        )
    return "\n".join(lines)
