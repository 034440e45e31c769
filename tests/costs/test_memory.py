"""Predicted activation bytes against what autograd is seen to keep, switch by switch, and against live memory."""

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hydra_dist.config import ModelConfig
from hydra_dist.context import ContextParallel
from hydra_dist.costs.memory import (
    activation_bytes,
    cast_weight_bytes,
    head_gradient_bytes,
    logits_bytes,
    mlp_tile_bytes,
)
from hydra_dist.model import Transformer, initialize
from hydra_dist.model.mlp import MLP

BASE = {"vocab_size": 64, "num_layers": 2, "hidden_size": 96, "head_dim": 16, "num_query_heads": 4, "num_key_heads": 2}
SWITCHES = ("use_convs", "use_qk_mean", "use_qk_norm", "use_value_shift", "rope")
MIXED = {
    "num_layers": 3,
    "layer_settings": [
        {"layers": [0], "compression_factor": 2, "use_output_norm": True, "temperature": "raw"},
        {"layers": [2], "attention": "gqa", "num_key_heads": 1, "window": 8},
    ],
}
PRECISIONS = ("fp32", "bf16", "bf16_autocast")
KINDS = [
    {"attention": "gqa"},
    {"attention": "gqa", "num_key_heads": 4},
    {"attention": "gqa", "rope_fraction": 0.0},
    {"conv_kernel_sizes": (1, 1)},
    {"conv_kernel_sizes": (1, 3)},
    {"conv_kernel_sizes": (3, 4)},
    {"num_key_heads": 1, "mlp_expansion": 1.0},
    {"use_output_norm": True},
    {"temperature": "raw"},
    {"temperature": "exp_clamp"},
    {"temperature": "raw", "use_qk_norm": False, "use_output_norm": True},
    MIXED,
]


def build(config, precision, **options):
    model = Transformer(config, loss_chunk_size=64, **options)
    initialize(model, 0)
    return model.bfloat16() if precision == "bf16" else model


def loss_of(model, precision, length, documents=False):
    tokens = torch.randint(0, 64, (1, length))
    starts = torch.arange(length).div(10, rounding_mode="floor").mul(10).unsqueeze(0)
    seq = ContextParallel(None).plan(length, starts) if documents else None
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16_autocast"):
        return model(tokens, seq, targets=tokens.clone())


def saved(model, precision, length, documents=False):
    """Bytes of all storages that autograd keeps, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, storages = [], {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept.append(tensor)  # so that no other tensor takes its place in memory
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, precision, length, documents)
    return sum(storages.values())


def slope(measure, *arguments, lengths=(64, 192)):
    """Bytes per token: what does not grow with the sequence falls out."""
    short, long = (measure(*arguments, length) for length in lengths)
    return (long - short) / (lengths[1] - lengths[0])


def kinds():
    for values in itertools.product([False, True], repeat=5):
        settings = dict(zip(SWITCHES, values, strict=True))
        yield {"rope_fraction": 0.5 if settings.pop("rope") else 0.0, **settings}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_switch(precision):
    for changes in [*KINDS, *kinds()]:
        config = ModelConfig.model_validate({**BASE, "num_layers": 1, **changes})
        measured = slope(saved, build(config, precision), precision)
        assert activation_bytes(config, precision).total("none") == pytest.approx(measured, rel=1e-3), changes


@pytest.mark.parametrize(
    "changes", [{}, {"conv_kernel_sizes": (3, 4)}, {"use_convs": False}, {"attention": "gqa"}, MIXED], ids=str
)
def test_packed_documents(changes):
    config = ModelConfig.model_validate({**BASE, **changes})
    model = build(config, "bf16_autocast")
    measured = slope(lambda length: saved(model, "bf16_autocast", length, documents=True))
    predicted = activation_bytes(config, "bf16_autocast", packed_documents=True)
    assert predicted.total("none") == pytest.approx(measured, rel=0.03)


def test_the_comparison_rejects_other_models_and_precisions():
    config = ModelConfig.model_validate(BASE)
    measured = slope(saved, build(config, "fp32"), "fp32")
    assert activation_bytes(config, "bf16").total("none") != pytest.approx(measured, rel=0.03)
    for changes in ({"num_key_heads": 4}, {"layer_settings": [{"layers": [1], "num_key_heads": 4}]}):
        wider = ModelConfig.model_validate({**BASE, **changes})
        assert activation_bytes(wider, "fp32").total("none") != pytest.approx(measured, rel=0.01)


def allocations(function):
    """Bytes that each allocation takes and each release (negative) gives back, in order, by the allocator's records."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = function()
    stack = list(profiled.profiler.kineto_results.experimental_event_tree())
    del result
    found = []
    while stack:
        event = stack.pop()
        stack += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    return [size for _, size in sorted(found)]


def alive(model, precision, length):
    """Bytes that forward leaves allocated."""
    return sum(allocations(lambda: loss_of(model, precision, length)))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("checkpointing", ["none", "layer"])
@pytest.mark.parametrize("changes", [{}, {"attention": "gqa"}, MIXED], ids=["ccgqa", "gqa", "mixed"])
def test_against_allocated_memory(changes, checkpointing, precision):
    config = ModelConfig.model_validate({**BASE, **changes})
    model = build(config, precision, activation_checkpointing=checkpointing)
    alive(model, precision, 64)
    measured = slope(alive, model, precision, lengths=(256, 1024))
    predicted = activation_bytes(config, precision).total(checkpointing)
    assert predicted == pytest.approx(measured, rel=0.03)
    other = activation_bytes(config, precision).total("none" if checkpointing == "layer" else "layer")
    assert other != pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_mlps_in_tiles(checkpointing, precision):
    config = ModelConfig.model_validate({**BASE, **MIXED})
    model = build(config, precision, activation_checkpointing=checkpointing, mlp_tile_size=64)
    alive(model, precision, 64)
    measured = slope(alive, model, precision, lengths=(256, 1024))
    assert activation_bytes(config, precision, mlp_tiles=True).total(checkpointing) == pytest.approx(measured, rel=0.03)
    if checkpointing == "none":
        assert activation_bytes(config, precision).total(checkpointing) != pytest.approx(measured, rel=0.2)
        fixed = saved(model, precision, 64) - 64 * slope(saved, model, precision)
        expected = head_gradient_bytes(config) + cast_weight_bytes(config, precision, mlp_tiles=True)
        assert fixed == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("mode", PRECISIONS)
@pytest.mark.parametrize("tile_size", [256, 512])
def test_what_a_tiled_mlp_needs_in_backward(tile_size, mode):
    config, rows = ModelConfig.model_validate(BASE), 2048
    dtype = torch.float32 if mode == "fp32" else torch.bfloat16
    peaks = []
    for size in (tile_size, None):
        layer = MLP(config.hidden_size, config.mlp_size, size).to(torch.bfloat16 if mode == "bf16" else torch.float32)
        x = torch.randn(rows, config.hidden_size, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16_autocast"):
            out = layer(x)
        weights = torch.ones_like(out)
        sizes = allocations(lambda: out.backward(weights))  # noqa: B023
        peaks.append(max(itertools.accumulate(sizes)) - x.nbytes)
    assert mlp_tile_bytes(config, mode, tile_size) == pytest.approx(peaks[0], rel=0.05)
    assert mlp_tile_bytes(config, mode, tile_size) != pytest.approx(peaks[1], rel=0.3)


class CountingHost:
    """Host memory that is the device's, and how much of it."""

    def __init__(self):
        self.num_bytes = 0

    def allocate(self, num_bytes):
        self.num_bytes += num_bytes
        return torch.empty(num_bytes, dtype=torch.uint8)

    def send(self, source, buffer):
        pass

    def wait(self, mark):
        pass


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_offload_holds_on_the_host(precision):
    config = ModelConfig.model_validate({**BASE, **MIXED})

    def held(length):
        host = CountingHost()
        model = build(config, precision, activation_checkpointing="layer", offload_to=host)
        model.offload.smallest = 1
        loss_of(model, precision, length)
        return host.num_bytes

    measured = slope(held)
    numbers = activation_bytes(config, precision)
    assert numbers.on_host == pytest.approx(measured, rel=0.01)
    assert numbers.total("layer") - numbers.ends != pytest.approx(measured, rel=0.1), "the last layer stays"
    kept = [layer.checkpoint for layer in numbers.layers]
    assert numbers.total("layer", activation_offload=True) == max(kept[0] + kept[1], kept[1] + kept[2]) + numbers.ends
    with pytest.raises(ValueError, match="without activation_checkpointing"):
        numbers.total("none", activation_offload=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast"])
@pytest.mark.parametrize("changes", [{}, MIXED], ids=["alike", "mixed"])
def test_what_does_not_grow_with_the_sequence(changes, precision):
    config = ModelConfig.model_validate({**BASE, **changes})
    model = build(config, precision)
    fixed = saved(model, precision, 64) - 64 * slope(saved, model, precision)
    expected = head_gradient_bytes(config) + cast_weight_bytes(config, precision)
    assert fixed == pytest.approx(expected, rel=0.01)


def test_logits_of_a_chunk():
    config = ModelConfig.model_validate(BASE)
    assert logits_bytes(config, "fp32", 100) == 100 * 64 * 4
    assert logits_bytes(config, "bf16", 100) == 100 * 64 * 6


def test_totals():
    numbers = activation_bytes(ModelConfig.model_validate({**BASE, **MIXED}), "fp32")
    assert len({layer.total for layer in numbers.layers}) == 3
    assert numbers.total("none") == sum(layer.total for layer in numbers.layers) + numbers.ends
    assert numbers.total("layer") == sum(layer.checkpoint for layer in numbers.layers) + numbers.ends
    assert numbers.again == numbers.layers[0].total - numbers.layers[0].checkpoint
    with pytest.raises(ValueError, match="layers"):
        numbers.total("layers")
