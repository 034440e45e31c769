"""Which benchmarks there are, which rows wait for a GPU, and which rows some result file already has.

A module of this package is a benchmark where it assigns ``NEEDS_GPU`` at its top level. That is read from its source,
so that listing imports no torch.
"""

import ast
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pydantic import TypeAdapter, ValidationError

from benchmarks.result import read_record, to_json, write_atomically
from hydra_dist.config.types import Section
from hydra_dist.errors import ConfigError, RunError, nearest

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PENDING = "pending.json"


class PendingRow(Section):
    """A row that nobody has measured yet."""

    benchmark: str
    row: str
    needs: str
    """The machine it takes, in words."""


@dataclass(frozen=True)
class Benchmark:
    """A module that measures one claim, as its source describes it."""

    name: str
    claim: str
    needs_gpu: bool
    gpu_rows: Mapping[str, str]
    """Row to the machine it takes; empty where no GPU is needed."""

    def load(self) -> ModuleType:
        """The imported module, with ``run`` and, where it has settings, ``SETTINGS``."""
        return importlib.import_module(f"benchmarks.{self.name}")


def find_benchmarks(directory: Path = HERE) -> dict[str, Benchmark]:
    """Every benchmark in ``directory``, by name. ValueError for one without a docstring, ``run`` or literal values."""
    found = {}
    for path in sorted(directory.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        values = dict(_assignments(tree))
        if "NEEDS_GPU" not in values:
            continue
        claim = ast.get_docstring(tree)
        if not claim:
            raise ValueError(f"{path}: a benchmark says in its docstring what it claims")
        if not any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            raise ValueError(f"{path}: a benchmark has a function run(options)")
        needs_gpu = bool(ast.literal_eval(values["NEEDS_GPU"]))
        rows = ast.literal_eval(values["GPU_ROWS"]) if "GPU_ROWS" in values else {"all": "one GPU"}
        found[path.stem] = Benchmark(path.stem, claim, needs_gpu, rows if needs_gpu else {})
    return found


def choose(names: Iterable[str], benchmarks: Mapping[str, Benchmark]) -> list[Benchmark]:
    """The named benchmarks, each once. ConfigError names the nearest where one is unknown."""
    chosen: dict[str, Benchmark] = {}
    for name in names:
        if name not in benchmarks:
            hint = nearest(name, benchmarks) or f"; there are {', '.join(benchmarks)}"
            raise ConfigError(f"benchmark {name}: unknown{hint}")
        chosen[name] = benchmarks[name]
    return list(chosen.values())


def read_pending(results: Path = RESULTS) -> list[PendingRow]:
    """The rows that wait for a GPU. RunError where the list is missing or damaged."""
    path = results / PENDING
    try:
        return TypeAdapter(list[PendingRow]).validate_json(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RunError(f"{path}: not a list of rows with benchmark, row and needs: {first['msg']}") from None


def write_pending(rows: Iterable[PendingRow], results: Path = RESULTS) -> None:
    """Replace the list of rows that wait."""
    write_atomically(results / PENDING, to_json([row.model_dump() for row in rows]))


def expected_pending(benchmarks: Mapping[str, Benchmark], results: Path = RESULTS) -> list[PendingRow]:
    """The rule for ``pending.json``: every row of a benchmark that needs a GPU and that no result file has."""
    measured = measured_rows(results)
    return [
        PendingRow(benchmark=name, row=row, needs=needs)
        for name, benchmark in benchmarks.items()
        for row, needs in benchmark.gpu_rows.items()
        if (name, row) not in measured
    ]


def measured_rows(results: Path = RESULTS) -> set[tuple[str, str]]:
    """(benchmark, row) of every result file of a GPU."""
    records = [read_record(path) for path in sorted(results.glob("*.json")) if path.name != PENDING]
    return {(record.name, row) for record in records if record.device != "cpu" for row in record.result.rows}


def results_of(name: str, results: Path = RESULTS) -> list[Path]:
    """The result files of one benchmark: the CPU's, then those of GPUs."""
    return [path for path in [results / f"{name}.json"] if path.exists()] + sorted(results.glob(f"{name}-*.json"))


def _assignments(tree: ast.Module) -> Iterable[tuple[str, ast.expr]]:
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            yield node.target.id, node.value
        elif isinstance(node, ast.Assign):
            yield from ((target.id, node.value) for target in node.targets if isinstance(target, ast.Name))
