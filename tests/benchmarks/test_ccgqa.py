"""The CCGQA benchmarks: what they compare, how it is judged, and both of them at a small size."""

import inspect
from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn import functional

from benchmarks import attention_peers as peers
from benchmarks import ccgqa, ccgqa_chain, ccgqa_cpu, ccgqa_tune, gpu_rows, gpu_timing
from benchmarks.gpu_rows import Row
from benchmarks.gpu_timing import Backward, Captured, Limits
from benchmarks.harness import Options
from benchmarks.result import Samples
from benchmarks.saved_bytes import saved_bytes
from hydra_dist.errors import RunError
from hydra_dist.model.prologue import Prologue
from hydra_dist.model.rope import rope_tables

CPU = torch.device("cpu")
SMALL = {
    "dtype": "float32",
    "prologue_backend": "plain",
    "hidden_size": 64,
    "head_dim": 16,
    "heads": "2/1",
    "prologue_tokens": 64,
    "layer_tokens": 32,
    "small_hidden_size": 32,
    "small_head_dim": 8,
    "small_batch": 2,
    "small_tokens": "8,16",
    "copy_bytes": 2**12,
    "matmul_size": 8,
    "rounds": 2,
    "repeats": 2,
}


def small(**changes):
    return Options(device="cpu", settings={**ccgqa.SETTINGS, **SMALL, **changes}, say=lambda text: None)


@pytest.fixture
def module():
    """A prologue with random weights in fp64, 4 query and 2 key heads of 8."""
    module = Prologue(4, 2, 8, (3, 2), True, True, True).double()
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter) * 0.5
    return module


def chain_and_operator(module):
    p = torch.randn(2, 20, 64, dtype=torch.float64, requires_grad=True)
    # Of tables that are no exact rotation the operator's backward knows nothing: it takes dot products as kept.
    rope = rope_tables(torch.arange(20), 4, 1e4, torch.float64)
    inputs = [p, *module.parameters()]
    results = []
    for outputs in (ccgqa_chain.eager_chain(module, p, rope), module(p, None, None, None, [20], rope)):
        torch.manual_seed(1)
        grads = [torch.randn(x.shape, dtype=x.dtype) for x in outputs]
        results.append([*(x.detach() for x in outputs), *torch.autograd.grad(outputs, inputs, grads)])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))


def test_the_chain_computes_what_the_operator_does(module):
    assert chain_and_operator(module) < 1e-12


def test_the_comparison_rejects_a_chain_that_pads_between_the_convolutions(module, monkeypatch):
    def wrong(module, z):
        taps = module.taps
        grouped = taps.w1.unflatten(1, (2, 8)).permute(0, 3, 2, 1).reshape(48, 8, 2)
        u = functional.conv1d(functional.pad(z.mT, (2, 0)), taps.w0.unsqueeze(1), taps.b0, groups=48)
        return functional.conv1d(functional.pad(u, (1, 0)), grouped, taps.b1.flatten(), groups=6).mT

    monkeypatch.setattr(ccgqa_chain, "_convolved", wrong)
    assert chain_and_operator(module) > 1e-3


def test_a_prologue_that_differs_from_the_chain_is_not_timed(monkeypatch):
    chain = ccgqa.eager_chain
    monkeypatch.setattr(ccgqa, "eager_chain", lambda module, p, rope: [2 * x for x in chain(module, p, rope)])
    with pytest.raises(RunError, match="differ by 50"):
        ccgqa.run(small())


def test_bytes_kept_are_those_of_distinct_storages():
    x, weight = torch.randn(10, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    assert saved_bytes(lambda: x @ weight, [x, weight]) == 0
    assert saved_bytes(lambda: x @ weight, []) == 4 * (40 + 16)

    def twice():
        wide = x.exp()  # kept by exp, and a part of it by both products
        return wide[:2] * wide[:2] @ weight

    assert saved_bytes(twice, [x, weight]) == 4 * (40 + 8)


def test_multi_head_attention_keeps_three_times_the_bytes():
    """Of a token: queries, keys, values and output against projection, queries, keys, values and output; in bf16."""
    (found,) = peers.kept_beside_multi_head(512, (2, 1), 64, 1, [64], CPU)
    assert found.theirs == 64 * (2 * 4 * 512 + 4 * 8)
    assert found.ratio == pytest.approx(4128 / 1300, rel=1e-3)
    (wide,) = peers.kept_beside_multi_head(512, (8, 2), 64, 1, [64], CPU)
    assert wide.ratio < 1.5


def test_captured_work_runs_in_turns_and_backward_gives_gradients():
    calls = []
    work = Captured([lambda: calls.append("a"), lambda: calls.append("b")], CPU, 5)
    work()
    assert "".join(calls) == "ababa"
    x = torch.randn(3, requires_grad=True)
    backward = Backward(lambda: [x.square()], [x])
    (first,), (second,) = backward(), backward()
    torch.testing.assert_close(first, 2 * x.detach() * backward._grads[0])
    assert torch.equal(first, second)


def test_times_are_of_one_call(monkeypatch):
    monkeypatch.setattr(gpu_timing, "timer_of", lambda device: lambda work: float(work.repeats * work._functions[0]()))
    seconds, ratios = gpu_timing.compare(
        {"one": Captured([lambda: 2.0], CPU, 4), "other": Captured([lambda: 6.0], CPU, 10)}, 3, CPU
    )
    assert (seconds["one"].median, seconds["other"].median, ratios["other"].median) == (2.0, 6.0, pytest.approx(3.0))


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [
        ("NVIDIA H200", 4.8e12),
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA H100 PCIe", 2.0e12),
        ("NVIDIA A100-SXM4-80GB", 2.039e12),
        ("NVIDIA A100-SXM4-40GB", 1.555e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_bandwidth_by_name(name, bandwidth):
    assert gpu_timing.peak_bandwidth(name) == bandwidth


@pytest.mark.parametrize(
    ("ratio", "bar", "at_most", "holds"),
    [(1.2, 1.3, True, True), (1.4, 1.3, True, False), (3.1, 3.0, False, True), (2.9, 3.0, False, False)],
)
def test_a_row_is_judged_by_its_median(ratio, bar, at_most, holds):
    row = Row("what", Samples.of([ratio, ratio, 100.0 * ratio], "1"), bar, at_most, 1e-6, 2e-6)
    assert row.holds is holds
    assert row.cells()[:3] == ("what", f"{'<=' if at_most else '>='} {bar:g}", ratio)
    assert Row("what", ratio, None, at_most, 10, 20).holds


def test_the_whole_benchmark_at_a_small_size():
    result = ccgqa.run(small(layer_heads="2/2,1/1"))
    names = [row[0] for row in result.table.rows]
    assert len(names) == 5 + 2 * 4 + 2 * 2 + 2
    assert result.rows == ()  # neither the shapes nor the chip that its rows wait for
    assert result.counts["prologue, forward, over the time of its bytes, bytes"] == 2 * 64 * 64 * 4
    assert result.counts["prologue, backward, over the time of its bytes, bytes"] == (48 + 2 * 64) * 64 * 4
    assert f"of {sum(row[1] != '-' for row in result.table.rows)} bars" in result.finding


SECONDS = {"copy": 1.0, "fused": 1.0, "eager chain": 6.0, "CCGQA": 1.0, "MHA": 3.1, "MHA without rotation": 0.5}


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"fused": 1.4}, ["prologue, forward", "eager chain"]),
        ({"eager chain": 4.0}, ["eager chain"]),
        ({"MHA": 2.6}, ["MHA over CCGQA"]),
        ({"MHA": 0.9}, ["MHA over CCGQA", "MHA over CCGQA", "MHA (FlashAttention-2)"]),
    ],
)
def test_each_bar_can_be_missed(changed, missed, monkeypatch):
    """Seconds by name; the chip is one whose bytes take just as long as a copy of the forward's."""
    seconds = {**SECONDS, "once": 1.0, "again": 1.0, **changed}

    def fake_compare(work, rounds, device):
        first = next(iter(work))
        ratios = {name: Samples.of([seconds[name] / seconds[first]], "1") for name in work if name != first}
        return {name: Samples.of([seconds[name]], "s") for name in work}, ratios

    samples = Samples.of([1.0], "1")
    bandwidth = 2 * 64 * 64 * 4 / 1.0
    monkeypatch.setattr(gpu_rows, "limits", lambda *_: Limits(samples, samples, bandwidth, 1e12, "NVIDIA H200", True))
    monkeypatch.setattr(gpu_rows, "compare", fake_compare)
    monkeypatch.setattr(ccgqa, "LAYER_BARS", {"1/1": (3.0, 2.5)})
    monkeypatch.setattr(ccgqa, "KEPT_BAR", 1.0)
    options = small(layer_heads="1/1", small_tokens="8")
    result = ccgqa.run(options)
    assert result.holds is (not missed)
    if missed:
        said = result.finding.split("; not ")[1].split("; limits")[0]
        assert all(name in said for name in missed)
        assert said.count("(") - said.count("(FlashAttention-2)") == len(missed)


@pytest.mark.parametrize(
    ("changes", "device", "stated"),
    [
        ({}, "NVIDIA H200", True),
        ({"rounds": 3, "tune": True}, "NVIDIA H100 80GB HBM3", True),
        ({"layer_tokens": 512}, "NVIDIA H200", False),
        ({}, "NVIDIA L4", False),
    ],
)
def test_rows_wait_for_the_stated_shapes_and_chips(changes, device, stated):
    options = Options(device="cuda", settings={**ccgqa.SETTINGS, **changes})
    assert ccgqa.as_stated(options, device) is stated


@dataclass(frozen=True)
class Tiling:
    rows: int
    num_warps: int
    other: int = 1


def test_tiles_are_tried_one_field_after_the_other():
    """The best of these needs both fields changed; what fails is left out."""

    def measure(tiling):
        if tiling.rows == 32:
            return None
        return Samples.of([1 + (tiling.rows != 128) + (tiling.num_warps != 8)], "s")

    measured = ccgqa_tune.descend(Tiling(64, 4), measure)
    assert min(measured, key=lambda tiling: measured[tiling].median) == Tiling(128, 8)
    assert set(measured) == {Tiling(64, 4), Tiling(128, 4), Tiling(128, 8)}
    with pytest.raises(ValueError, match="does not work"):
        ccgqa_tune.descend(Tiling(32, 4), measure)


def test_the_tables_of_the_kernels_are_found():
    from hydra_dist.kernels import ccgqa_prologue_forward, ccgqa_prologue_workspace

    for table in (ccgqa_prologue_forward.TILINGS, ccgqa_prologue_workspace.TILINGS):
        tiling = ccgqa_tune.in_table(table, ("sm_90", 2, 128))
        assert {"rows", "channels", "num_warps", "programs"} <= set(tiling.__dataclass_fields__)
        with pytest.raises(ValueError, match="0 tilings"):
            ccgqa_tune.in_table(table, ("sm_90", 2, 127))


def test_tiles_that_compute_something_else_are_left_out():
    said = []

    def call(tiling):
        return [torch.ones(3) * (2 if tiling.rows == 128 else 1)]

    measure = ccgqa_tune._timing([call], Tiling(64, 4), 2, CPU, said.append)
    assert measure(Tiling(64, 8)) is not None
    assert measure(Tiling(128, 4)) is None
    assert "computes something else" in said[-1]


def test_the_launchers_take_what_they_are_called_with(module):
    from hydra_dist.kernels import ccgqa_prologue_backward, ccgqa_prologue_forward

    signatures = [inspect.signature(x) for x in (ccgqa_prologue_forward.forward, ccgqa_prologue_backward.backward)]
    seen = []

    def launcher(signature):
        def run(*arguments, **shape):
            seen.append(signature.bind(*arguments, **shape).arguments)
            p = seen[-1]["p"]
            q, k, v = p[..., :32], p[..., 32:48], p[..., 48:]
            return q, k, v, p.new_empty(0)

        return run

    p = torch.randn(1, 20, 64, dtype=torch.float64)
    calls = ccgqa_tune.launches(module, [p, p], *map(launcher, signatures))
    assert {name: len(each) for name, each in calls.items()} == {"forward": 2, "backward": 2}
    calls["backward"][0](Tiling(64, 4))
    assert seen[-1]["tiling"] == Tiling(64, 4)
    assert seen[-1]["w1"].shape == (6, 16, 8)
    assert seen[-1]["beta"].shape == (2,)
    assert seen[-1]["chunk_lengths"] == [20]


def cpu_options(**changes):
    settings = {**ccgqa_cpu.SETTINGS, "sequence_length": 64, "rounds": 2, "kept_batch": 1, "kept_lengths": "16"}
    return Options(device="cpu", settings={**settings, "heads": "2/1", **changes}, say=lambda text: None)


def test_the_cpu_benchmark_at_a_small_size():
    result = ccgqa_cpu.run(cpu_options(largest_ratio=1e9))
    assert result.holds
    assert [row[0] for row in result.table.rows[:2]] == ["2/1 heads, forward", "2/1 heads, forward and backward"]
    assert result.counts["2/1 heads, kept for backward, 1 x 16 tokens, MHA"] == 16 * 4128
    assert not ccgqa_cpu.run(cpu_options(largest_ratio=1e9, least_kept_ratio=3.5)).holds
    assert not ccgqa_cpu.run(cpu_options(largest_ratio=0.0)).holds


def test_the_products_are_those_of_the_layer():
    """The layer with products, and nothing else, in its place gives the same as the products alone."""
    layer = peers.ccgqa(32, (2, 1), 8, CPU, torch.float32)
    forward = ccgqa_cpu.alternatives(layer, 12)["forward"]
    shapes = [[list(x.shape) for x in function()] for function in forward]
    assert shapes[0] == [[1, 12, 32], [3, 12, 8], [1, 12, 32]]
    assert shapes[1] == [[1, 12, 32], [1, 12, 1, 8], [1, 12, 1, 8]]
    both = ccgqa_cpu.alternatives(layer, 12)["forward and backward"]
    products, whole = (function() for function in both)
    # Gradients of the same weights: down-projection, grouped convolution, up-projection.
    assert {x.shape for x in products[-3:]} <= {x.shape for x in whole}


def test_layers_are_compared_with_causal_attention_only():
    seq = peers.SequenceWith(4, CPU, lambda q, k, v: q)
    x = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="causal"):
        seq.attention(x, x, x, window=3)
    assert seq.attention(x, x, x) is x
    _, flash = peers.flash_attention_2(CPU)
    torch.testing.assert_close(flash(x, x, x), peers.ours("reference")(x, x, x))


def test_operations_of_a_layer():
    layer = peers.ccgqa(64, (4, 2), 8, CPU, torch.float32)
    forward, backward = peers.layer_flops(layer, 10)
    pairs = 10 * 11 // 2
    convolutions = 2 * 48 * (2 + 8 * 2)
    assert forward == 10 * (2 * 64 * (2 * 32 + 2 * 16) + convolutions) + 4 * 32 * pairs
    assert backward == 2 * forward + 4 * 32 * pairs // 2
    assert peers.layer_flops(peers.multi_head(64, 8, CPU, torch.float32), 10)[0] == 10 * 2 * 4 * 64**2 + 4 * 64 * pairs


def test_the_peer_without_rotation_has_the_same_weights():
    rotated, unrotated = (peers.multi_head(32, 8, CPU, torch.float32, rotated=yes) for yes in (True, False))
    assert torch.equal(rotated.qkv.weight, unrotated.qkv.weight)
    x = torch.randn(1, 6, 32)
    assert not torch.allclose(rotated(x), unrotated(x))
    assert peers.rope_of(unrotated, 6, CPU) is None


def test_a_row_may_be_shown_without_being_judged():
    row = Row("what", Samples.of([0.5], "1"), 3.0, False, 1.0, 2.0)
    assert not row.holds
    assert replace(row, bar=None).holds
    assert replace(row, bar=None).cells()[1] == "-"
