"""Bytes of tensors alive, against PyTorch's own record of every allocation."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.tensor_memory import TensorMemory


def train_step(model: nn.Module, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    model(torch.randn(rows, 64, generator=generator)).square().mean().backward()


def profiled_peak(model: nn.Module, rows: int) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        train_step(model, rows)
    alive = peak = 0
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@pytest.fixture
def mlp():
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    train_step(model, 4)  # gradients are resident from here on
    return model


@pytest.mark.parametrize("rows", [500, 2000])
def test_peak_is_what_the_profiler_saw(mlp, rows):
    with TensorMemory() as memory:
        train_step(mlp, rows)
    assert memory.peak_bytes == profiled_peak(mlp, rows)
    assert memory.alive_bytes == 0
    assert memory.largest_elements == rows * 256


def test_resident_tensors_and_views_of_them_count_nothing():
    resident = torch.zeros(1000)
    with TensorMemory() as memory:
        resident.add_(1)
        view = resident[:10].view(2, 5).t()
        torch.mul(resident, 2, out=resident)
        resident.detach()
    assert (memory.peak_bytes, memory.num_storages) == (0, 0)
    assert view.shape == (5, 2)


def test_alive_until_the_last_holder_lets_go():
    x = torch.zeros(1000, requires_grad=True)
    with TensorMemory() as memory:
        y = x.exp()  # autograd keeps it for backward
        z = y.sum()
        del y
        assert memory.alive_bytes == 4004
        z.backward()
        del z
        assert memory.alive_bytes == x.grad.untyped_storage().nbytes()
    x.grad = None
    assert memory.alive_bytes == 0


@torch.library.custom_op("hydra_dist::memory_of_a_test", mutates_args=())
def _operator(x: torch.Tensor) -> torch.Tensor:
    scratch = torch.ones(5000)
    return x * scratch.sum()


def test_tensors_inside_our_operators_count():
    with TensorMemory() as memory:
        _operator(torch.ones(3))
    assert memory.largest_elements == 5000
    assert memory.largest_made_by == "aten.ones.default"


def scores_step(sequence_length: int) -> TensorMemory:
    """Plain softmax attention, which makes the score matrix."""
    q = torch.ones(sequence_length, 8, requires_grad=True)
    with TensorMemory() as memory:
        ((q @ q.t()).softmax(-1) @ q).sum().backward()
    return memory


def test_quadratic_attention_is_found_out():
    short, long = scores_step(200), scores_step(400)
    assert long.largest_elements == 400 * 400
    assert long.peak_bytes / short.peak_bytes > 3.5


def test_the_thread_setting_comes_back():
    assert torch.autograd.is_multithreading_enabled()
    with TensorMemory():
        assert not torch.autograd.is_multithreading_enabled()
    assert torch.autograd.is_multithreading_enabled()
