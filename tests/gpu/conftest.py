"""Everything in this folder runs on a CUDA GPU, and is skipped with one reason where torch can use none."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
REASON = "needs a CUDA GPU"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=REASON))
