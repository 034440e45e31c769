"""What the tests of modules for other people's trainers share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def relative_error():
    """max|a - b| / max|b|"""

    def measure(a, b):
        assert a.shape == b.shape
        return float((a.detach() - b.detach()).abs().max() / b.detach().abs().max().clamp(min=1e-300))

    return measure
