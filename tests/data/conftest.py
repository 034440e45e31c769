"""Small corpora for the tests of the data package."""

from collections.abc import Callable
from pathlib import Path

import pytest

WORDS = ["attention", "ring", "halo", "héllo", "日本", "🚀", "def", "", "\n\n\t", "=", "3.14", "<|end|>", "<|begin|>"]


def text(number: int) -> str:
    """A text of its own for each number, 20 to 300 characters, with characters of 1 to 4 bytes."""
    return " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(5 + number * 13 % 40)) + f" {number}"


@pytest.fixture(scope="session")
def write_tree() -> Callable[[Path, int], Path]:
    """Write ``count`` text files into a directory and return it."""

    def write(root: Path, count: int) -> Path:
        for number in range(count):
            path = root / f"part{number % 3}" / f"{number:03d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text(number).encode())
        return root

    return write


@pytest.fixture
def tree(tmp_path: Path, write_tree: Callable[[Path, int], Path]) -> Callable[[int], Path]:
    """``write_tree`` into the test's own directory ``corpus``."""
    return lambda count: write_tree(tmp_path / "corpus", count)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory with its bytes."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture
def read_all() -> Callable[[Path], dict[str, bytes]]:
    return contents
