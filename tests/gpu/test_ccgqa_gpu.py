"""The fused CCGQA prologue on a GPU against the plain one in fp64, and the layer compiled and in a CUDA graph."""

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks import ccgqa as benchmark
from benchmarks.gpu_timing import Backward, Captured
from benchmarks.harness import Options
from hydra_dist.model import CCGQA, initialize
from hydra_dist.model.prologue import Prologue
from hydra_dist.model.prologue_operator import prologue
from hydra_dist.model.rope import rope_tables

DEVICE = torch.device("cuda")
ROOT = Path(__file__).resolve().parents[2]
BATCH, CHUNKS = 2, (70, 131)
LENGTH = sum(CHUNKS)
STARTS = [0, 1, 2, 40, 69, 71, 72, 140, 200]
"""Rows that begin a document, in the first batch row; in the second all belong to one that began before."""
EARLIER = 3
"""Rows before each chunk that belong to the document of its first row; a chunk's taps may reach further."""

ALL_ON = {"use_qk_mean": True, "use_qk_norm": True, "use_value_shift": True}
NO_MEAN, NO_NORM, NO_SHIFT = {"use_qk_mean": False}, {"use_qk_norm": False}, {"use_value_shift": False}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = {  # heads, head_dim, kernel sizes, dtype, rows before the chunks, documents, rotation, changes
    "groups of 4": ((8, 2), 128, (2, 2), BF16, False, False, True, {}),
    "groups of 4, chunks and documents": ((8, 2), 128, (2, 2), BF16, True, True, True, {}),
    "groups of 1, long taps, chunks and documents": ((4, 4), 64, (4, 3), BF16, True, True, True, {}),
    "groups of 8, chunks, without mean": ((8, 1), 64, (2, 2), BF16, True, False, True, NO_MEAN),
    "odd key heads, one tap, documents, not rotated": ((6, 3), 128, (1, 1), BF16, False, True, False, {}),
    "fp16, odd key heads, chunks and documents, without norm": ((3, 3), 64, (2, 2), FP16, True, True, True, NO_NORM),
    "fp16, chunks and documents, without convolutions": ((4, 2), 128, None, FP16, True, True, True, {}),
    "fp32, documents, without value shift": ((4, 2), 128, (2, 2), FP32, False, True, True, NO_SHIFT),
    "fp32, chunks and documents": ((2, 1), 64, (2, 2), FP32, True, True, True, {}),
}
CHUNKS_AND_DOCUMENTS = "groups of 4, chunks and documents"
FLOORS = {torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 5e-4}
"""Errors below which the plain operator's own are a matter of luck."""
FEW = 64
"""Elements of a gradient whose error is a matter of luck, in the plain operator too: sums of what mostly cancels."""


class Case:
    """A prologue, what goes into it, and the gradients of what comes out, all in fp64."""

    def __init__(self, name):
        torch.manual_seed(0)
        heads, head_dim, kernel_sizes, self.dtype, chunks, documents, rotated, changes = CASES[name]
        self.module = Prologue(*heads, head_dim, kernel_sizes, **{**ALL_ON, **changes}).to(DEVICE, torch.float64)
        for parameter in self.module.parameters():
            parameter.data = torch.randn_like(parameter) * (0.5 if parameter.dim() < 3 else head_dim**-0.5)
        switches = self.module.switches
        self.lengths = list(CHUNKS) if chunks else [LENGTH]
        ages = torch.stack([self._ages(STARTS), torch.arange(LENGTH) + 1000]).to(DEVICE, torch.int32)
        self.ages = ages if documents else None
        width = switches.latent_size + switches.value_size
        self.rows = {"p": torch.randn(BATCH, LENGTH, width, device=DEVICE, dtype=torch.float64)}
        self.inside = {}
        if chunks:
            firsts = ages[:, [0, CHUNKS[0]]] if documents else torch.full((BATCH, 2), EARLIER, device=DEVICE)
            for key, count, size in (
                ("z_before", switches.num_rows_before, switches.latent_size),
                ("v_before", int(switches.value_shift), switches.value_size // 2),
            ):
                if not count:
                    continue
                delays = torch.arange(count, 0, -1, device=DEVICE)
                inside = (delays <= firsts.unsqueeze(-1)).unsqueeze(-1)
                before = torch.randn(BATCH, 2, count, size, device=DEVICE, dtype=torch.float64)
                self.rows[key], self.inside[key] = before * inside, inside
        tables = rope_tables(torch.arange(LENGTH, device=DEVICE), head_dim // 2, 1e4, torch.float64)
        self.rope = tables if rotated else None
        self.grads = [torch.randn_like(x) for x in self.run(torch.float64, "plain")[:3]]

    def _ages(self, starts):
        """Ages of rows of which some begin a document; the first row of the second chunk is in the middle of one."""
        begins = torch.tensor([max(start for start in starts if start <= row) for row in range(LENGTH)])
        return torch.arange(LENGTH) - begins

    def run(self, dtype, backend, factor=1.0):
        """q, k, v and, once there are gradients of them, those of all inputs; weights in fp32 where rows are narrower.

        ``factor`` is on the temperature.
        """
        wide = torch.promote_types(dtype, torch.float32)
        rows = {key: x.to(dtype).requires_grad_() for key, x in self.rows.items()}
        module = copy.deepcopy(self.module).to(wide)
        rope = None if self.rope is None else tuple(x.to(wide) for x in self.rope)
        beta = module.beta()
        outputs = prologue(
            rows["p"],
            rows.get("z_before"),
            rows.get("v_before"),
            self.ages,
            self.lengths,
            module.taps,
            None if beta is None else beta * factor,
            rope,
            module.switches,
            backend,
        )
        if not hasattr(self, "grads"):
            return [x.detach() for x in outputs]
        inputs = {**rows, **dict(module.named_parameters())}
        grads = [grad.to(dtype) for grad in self.grads]
        found = torch.autograd.grad(outputs, list(inputs.values()), grads, allow_unused=True)
        # What a halo sends for rows of another document goes nowhere.
        parts = {
            key: None if x is None else x.double() * self.inside.get(key, 1.0)
            for key, x in zip(inputs, found, strict=True)
        }
        return [*(x.detach().double() for x in outputs), *(x for x in parts.values() if x is not None)]


def errors(results, exact):
    """Relative, root mean square, of each tensor."""
    assert len(results) == len(exact)
    return [((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in zip(results, exact, strict=True)]


def beyond(case, results):
    """Errors of ``results`` that are more than twice those of the plain operator in the same dtype."""
    exact = case.run(torch.float64, "plain")
    plain = errors(case.run(case.dtype, "plain"), exact)
    typical = max(plain[3:])
    bounds = [
        max(4 * typical if x.numel() < FEW else 2 * error, FLOORS[case.dtype])
        for x, error in zip(exact, plain, strict=True)
    ]
    found = errors(results, exact)
    return {i: (a, bound) for i, (a, bound) in enumerate(zip(found, bounds, strict=True)) if not a <= bound}


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """All kernels in Triton's cache on disk, compiled in processes side by side: one after the other takes minutes."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['prepare'](sys.argv[2])"
    commands = [[sys.executable, "-c", code, __file__, name] for name in ("layer", "benchmark", *CASES)]
    # What fails here fails again, with its message, in a test.
    with ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) // 2)) as pool:
        list(pool.map(lambda command: subprocess.run(command, capture_output=True, cwd=ROOT), commands))


def prepare(name):
    """Run once what a test runs, in a process of its own."""
    if name == "layer":
        layer = make_layer()
        gradients(layer, layer, rows())
    elif name == "benchmark":
        run_benchmark()
    else:
        case = Case(name)
        case.run(case.dtype, "triton")


@pytest.mark.parametrize("name", CASES)
def test_no_more_than_twice_the_error_of_the_plain_operator(name):
    case = Case(name)
    assert not beyond(case, case.run(case.dtype, "triton"))


def test_the_check_above_rejects_a_wrong_temperature_and_missing_rows():
    case = Case(CHUNKS_AND_DOCUMENTS)
    assert beyond(case, case.run(case.dtype, "triton", factor=1.03))
    exact_rows, case.rows = case.rows, {"p": case.rows["p"]}
    q, k, v = case.run(case.dtype, "triton")[:3]
    case.rows = exact_rows
    rest = case.run(case.dtype, "triton")[3:]
    assert set(beyond(case, [q, k, v, *rest])) >= {0, 1, 2}


@pytest.mark.parametrize("name", [CHUNKS_AND_DOCUMENTS, "fp32, chunks and documents"])
def test_two_runs_give_the_same_bits(name):
    case = Case(name)
    for a, b in zip(case.run(case.dtype, "triton"), case.run(case.dtype, "triton"), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def layer():
    return make_layer()


def make_layer():
    layer = CCGQA(256, 8, 2, 64)
    initialize(layer, 0, init_std=256**-0.5)
    return layer.to(DEVICE, torch.bfloat16)


def gradients(function, layer, x):
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().mean(), [x, *layer.parameters()])]


def close(ours, theirs, bound=2e-2):
    return all(
        ((a.float() - b.float()).norm() <= bound * b.float().norm()).item() for a, b in zip(ours, theirs, strict=True)
    )


def rows():
    return torch.randn(2, 300, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)


def test_the_layer_compiles_into_one_graph(layer):
    x = rows()
    compiled = torch.compile(layer, fullgraph=True)
    assert close(gradients(compiled, layer, x), gradients(layer, layer, x))
    assert not close(gradients(compiled, layer, rows()), gradients(layer, layer, x))


def test_the_layer_in_a_cuda_graph(layer):
    """Captured on one input, replayed on another: nothing in it waits for the host or keeps an old address."""
    x, results = rows(), {}

    def step():
        results["found"] = gradients(layer, layer, x)

    captured = Captured([step], DEVICE, 1)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    captured()
    torch.cuda.synchronize()
    found = [part.clone() for part in results["found"]]
    assert close(found, gradients(layer, layer, x))
    assert not close(found, gradients(layer, layer, rows()))


def test_backward_alone_in_a_cuda_graph(layer):
    x, results = rows(), {}
    backward = Backward(lambda: (layer(x),), [x, *layer.parameters()])

    def step():
        results["found"] = backward()

    Captured([step], DEVICE, 2)()
    torch.cuda.synchronize()
    expected = torch.autograd.grad(layer(x), [x, *layer.parameters()], backward._grads)
    assert close(results["found"], expected)


def run_benchmark():
    shapes = {"hidden_size": 256, "head_dim": 64, "prologue_tokens": 1024, "layer_tokens": 512, "small_batch": 2}
    shapes |= {"heads": "2/1", "layer_heads": "2/1", "small_hidden_size": 256, "small_heads": "2/1"}
    shapes |= {"small_tokens": "256", "copy_bytes": 2**24, "matmul_size": 1024, "rounds": 2, "repeats": 2}
    settings = {**benchmark.SETTINGS, **shapes}
    return benchmark.run(Options(device="cuda", settings=settings, say=lambda text: None))


def test_the_benchmark_runs_at_a_small_shape():
    result = run_benchmark()
    assert len(result.table.rows) == 5 + 4 + 2 + 1
    assert result.rows == ()  # not the shapes that the rows wait for
    assert all(samples.minimum > 0 for samples in result.quantities.values())
