"""Activation offload and the tiled MLP on a GPU: bit-equal numbers, less memory, and copies beside the computation."""

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hydra_dist.config import ModelConfig
from hydra_dist.costs.memory import activation_bytes
from hydra_dist.model import Transformer, initialize
from hydra_dist.model.mlp import MLP
from hydra_dist.model.offload import PinnedHost

CONFIG = ModelConfig(vocab_size=61, num_layers=6, hidden_size=512, head_dim=64, num_query_heads=8, num_key_heads=2)
LENGTH = 8192
DEVICE = torch.device("cuda")


def build(offload, config=CONFIG, **options):
    options = {"activation_checkpointing": "layer", "loss_chunk_size": 1024, **options}
    model = Transformer(config, offload_to=PinnedHost(DEVICE) if offload else None, **options)
    initialize(model, seed=0)
    return model.to(DEVICE, torch.bfloat16)


def step(model, length=LENGTH, seed=0):
    """Loss and all gradients, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(61, (1, length + 1), generator=generator).to(DEVICE)
    model.zero_grad()
    loss = model(tokens[:, :-1], targets=tokens[:, 1:])
    loss.backward()
    return [loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters())]


def peak(model, length):
    """Bytes allocated at the peak of a second step, on top of what lies there before it."""
    step(model, length)
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(model, length)
    return torch.cuda.max_memory_allocated() - before


@pytest.fixture
def deterministic():
    """Two runs alike, so that a difference is the offload's."""
    model = build(False)
    first, second = step(model), step(model)
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        pytest.fail("two steps without offload differ, so nothing can be said about one with it")
    return first


def test_gradients_are_bit_equal_step_after_step(deterministic):
    model, plain = build(True), build(False)
    for seed in (0, 1, 2):
        for a, b in zip(step(model, seed=seed), step(plain, seed=seed), strict=True):
            assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(step(plain, seed=3), deterministic, strict=True))


def test_gradients_are_bit_equal_where_copies_are_slow(deterministic, monkeypatch):
    """A copy that starts ten milliseconds late would show every read that does not wait for it."""
    for name in ("send", "fetch"):
        monkeypatch.setattr(PinnedHost, name, late(getattr(PinnedHost, name)))
    model = build(True)
    for _ in range(2):
        for a, b in zip(step(model), deterministic, strict=True):
            assert torch.equal(a, b)
    monkeypatch.setattr(PinnedHost, "wait", lambda host, mark: None)
    assert not all(torch.equal(a, b) for a, b in zip(step(model), deterministic, strict=True))


def late(copy):
    def copy_later(host, *args):
        with torch.cuda.stream(host._stream):
            torch.cuda._sleep(20_000_000)
        return copy(host, *args)

    return copy_later


def test_what_stays_on_the_gpu_is_what_was_predicted():
    deep = CONFIG.model_copy(update={"num_layers": 16})
    length = 32768
    saved = peak(build(False, deep), length) - peak(build(True, deep), length)
    bytes_per_token = activation_bytes(deep, "bf16")
    expected = (bytes_per_token.total("layer") - bytes_per_token.total("layer", activation_offload=True)) * length
    assert saved == pytest.approx(expected, rel=0.1)


def test_pinned_buffers_are_used_again():
    model = build(True)
    step(model)
    held = sorted(buffer.data_ptr() for buffer in model.offload.free)
    assert held
    assert all(buffer.is_pinned() for buffer in model.offload.free)
    step(model)
    assert sorted(buffer.data_ptr() for buffer in model.offload.free) == held


def test_copies_run_beside_the_computation():
    model = build(True)
    step(model, 32768)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        step(model, 32768)
    spans = {"copy": [], "compute": []}
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            pinned = "Memcpy" in event.name and "Pinned" in event.name
            spans["copy" if pinned else "compute"].append((event.time_range.start, event.time_range.end))
    copies = [span for span in spans["copy"] if span[1] - span[0] > 100]
    assert copies
    beside = sum(overlap(span, spans["compute"]) for span in copies)
    assert beside > 0.5 * sum(end - start for start, end in copies)


def overlap(span, others):
    """Time of ``span`` in which one of ``others``, which do not overlap each other, runs too."""
    return sum(max(0.0, min(span[1], end) - max(span[0], start)) for start, end in others)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile_size", [1, 100, 256, 1000])
def test_an_mlp_in_tiles(dtype, tile_size):
    whole = MLP(64, 192).to(DEVICE, torch.float64)
    tiled = MLP(64, 192, tile_size).to(DEVICE, dtype)
    low = MLP(64, 192).to(DEVICE, dtype)
    whole.load_state_dict(low.state_dict())
    tiled.load_state_dict(low.state_dict())
    x = torch.randn(2, 300, 64, device=DEVICE, dtype=dtype)
    weights = torch.randn(2, 300, 64, device=DEVICE, dtype=dtype)
    exact, ours, theirs = (gradients(layer, x, weights) for layer in (whole, tiled, low))
    floor = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert error(a, c) <= max(2 * error(b, c), floor)


def gradients(layer, x, weights):
    dtype = layer.down.weight.dtype
    x = x.to(dtype, copy=True).requires_grad_()
    out = layer(x)
    out.backward(weights.to(dtype))
    return out.detach(), x.grad, layer.gate_up.weight.grad, layer.down.weight.grad


def error(a, b):
    return float((a.double() - b).abs().max() / b.abs().max())


def test_an_mlp_in_tiles_takes_the_memory_of_a_tile():
    rows, width, mlp_size, tile_size = 65536, 512, 2048, 2048
    peaks = []
    for size in (tile_size, None):
        layer = MLP(width, mlp_size, size).to(DEVICE, torch.bfloat16)
        x = torch.randn(1, rows, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        layer(x).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    whole = rows * 2 * mlp_size * 2
    assert peaks[0] < 0.6 * whole
    assert peaks[1] > whole
