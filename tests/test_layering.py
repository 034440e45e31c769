"""Imports run down the house and never up, and what answers without a GPU loads no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hydra_dist"
GROUND = {"config", "errors", "costs"}
BELOW = {
    "cli": {"export", "train", "data"},
    "export": {"train", "model", "data"},
    "drop_in": {"model", "context"},
    "train": {"model", "context", "data", "attention"},
    "model": {"context", "attention", "kernels"},
    "context": {"attention"},
    "attention": {"kernels"},
    "kernels": set(),
    "data": set(),
    "memory": set(),
    "costs": set(),
    "config": set(),
    "errors": set(),
}
"""What each part may import, beside the ground that all stand on."""
WITHOUT_TORCH = ("config", "errors", "costs", "memory")


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(source: str) -> set[str]:
    """The parts of the package that ``source`` imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("hydra_dist.")} - {"__version__"}


def forbidden(part: str, source: str) -> set[str]:
    return imported_parts(source) - BELOW[part] - GROUND - {part}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_down(path):
    if path.parent == PACKAGE and path.name == "__init__.py":
        assert imported_parts(path.read_text()) == set()
    else:
        assert forbidden(part_of(path), path.read_text()) == set()


def test_the_check_above_sees_an_import_that_runs_up():
    assert forbidden("attention", "def f():\n    from hydra_dist.train import loop") == {"train"}
    assert forbidden("costs", "import hydra_dist.model.loss") == {"model"}


@pytest.mark.parametrize("part", WITHOUT_TORCH)
def test_the_ground_imports_no_torch(part):
    modules = [f"hydra_dist.{part}"]
    if (PACKAGE / part).is_dir():
        modules += [f"hydra_dist.{part}.{path.stem}" for path in (PACKAGE / part).glob("[!_]*.py")]
    program = f"import sys, {', '.join(modules)}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "False"


def test_files_are_read_in_one_sitting():
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 350} == {}
