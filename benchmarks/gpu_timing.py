"""Timing work on a GPU without the gaps between launches, and the chip's limits that times are held against.

What is timed is captured in a CUDA graph that repeats it, so that Python and the launches take no part. Work that only
moves bytes is given several sets of inputs in turn, or a repetition would read what the last one left in the cache. On
a CPU the same functions run as they are, by the wall clock.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import Timer, cuda_seconds, interleaved, wall_seconds
from benchmarks.result import Samples
from hydra_dist.costs.flops import peak_flops

PEAK_BANDWIDTH = {
    "A100": 1.555e12,
    "A100 80GB": 2.039e12,
    "H100": 3.35e12,
    "H100 NVL": 3.9e12,
    "H100 PCIe": 2.0e12,
    "H200": 4.8e12,
    "B200": 8.0e12,
}
"""Bytes a second of device memory, from NVIDIA's data sheets, by words of the name that CUDA gives the device."""

WARM_UP = 2
"""Runs before a capture: kernels are compiled and chosen in them."""

Work = Callable[[], object]


@dataclass(frozen=True)
class Limits:
    """What the chip can do at most."""

    copy: Samples
    """Bytes a second of a large copy on the device, read and written ones counted."""
    matmul: Samples
    """Floating-point operations a second of a large matrix product of random numbers."""
    bandwidth: float
    """Bytes a second by the data sheet; what was measured where the chip is not in the table."""
    flops: float
    """The same for operations."""
    name: str
    """CUDA's name of the device."""
    listed: bool
    """Whether the tables have it."""

    @property
    def text(self) -> str:
        """One line."""
        source = f"data sheet of {self.name}" if self.listed else f"measured, no table has {self.name}"
        return (
            f"limits {self.bandwidth / 1e12:.2f} TB/s and {self.flops / 1e12:.0f} TFLOP/s ({source}), measured "
            f"{self.copy.median / 1e12:.2f} TB/s copying and {self.matmul.median / 1e12:.0f} TFLOP/s multiplying"
        )


class Captured:
    """Calls of the functions in turn, ``repeats`` in all, as one CUDA graph; on a CPU as they are."""

    def __init__(self, functions: Sequence[Work], device: torch.device, repeats: int) -> None:
        self.repeats = repeats
        self._functions = functions  # hold the inputs, whose addresses the graph reads
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._graph = self._capture(torch.cuda.Stream(device))

    def __call__(self) -> None:
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()

    def _run(self) -> None:
        for turn in range(self.repeats):
            self._functions[turn % len(self._functions)]()

    def _capture(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for function in [*self._functions] * WARM_UP:
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._run()
        return graph


class Backward:
    """Only the backward of a function, again and again: gradients of ``inputs`` for what one forward gave."""

    def __init__(self, function: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
        self._function, self._inputs = function, inputs
        self._outputs: list[Tensor] | None = None
        self._grads: list[Tensor] = []

    def __call__(self) -> Sequence[Tensor]:
        if self._outputs is None:
            # Backward runs on the stream of its forward, so both belong to the first call, on the stream of a capture.
            self._outputs = list(self._function())
            self._grads = [torch.randn_like(x) for x in self._outputs]
        return torch.autograd.grad(self._outputs, self._inputs, self._grads, retain_graph=True)


def forward_and_backward(function: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> Work:
    """``function`` and then the gradients of ``inputs``, for the same random gradients each time."""
    with torch.no_grad():
        grads = [torch.randn_like(x) for x in function()]
    return lambda: torch.autograd.grad(function(), inputs, grads)


def compare(
    work: dict[str, Captured], rounds: int, device: torch.device
) -> tuple[dict[str, Samples], dict[str, Samples]]:
    """Time captured work in turns.

    Returns:
        Seconds of one call by name; and for every name after the first how many times the first's time it takes, round
        by round.
    """
    measured = interleaved(work, rounds, warmup=1, timer=timer_of(device))
    repeats = {name: captured.repeats for name, captured in work.items()}
    first = next(iter(work))
    seconds = {name: _scaled(samples, 1 / repeats[name]) for name, samples in measured.seconds.items()}
    return seconds, {name: _scaled(ratio, repeats[first] / repeats[name]) for name, ratio in measured.ratios.items()}


def timer_of(device: torch.device) -> Timer:
    """CUDA events on a GPU, the wall clock on a CPU."""
    return cuda_seconds if device.type == "cuda" else wall_seconds


def copy_of(num_bytes: int, device: torch.device) -> Work:
    """A copy on the device that reads and writes ``num_bytes`` together."""
    source = torch.randint(-128, 128, (num_bytes // 2,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def limits(device: torch.device, copy_bytes: int, matmul_size: int, rounds: int) -> Limits:
    """Measure a large copy and a large bf16 matrix product, and look the chip up."""
    a, b = (torch.randn(matmul_size, matmul_size, device=device, dtype=torch.bfloat16) for _ in range(2))
    work = {"copy": Captured([copy_of(copy_bytes, device)], device, 4), "matmul": Captured([lambda: a @ b], device, 4)}
    seconds, _ = compare(work, rounds, device)
    copy = Samples.of([copy_bytes // 2 * 2 / x for x in seconds["copy"].raw], "bytes/s")
    matmul = Samples.of([2 * matmul_size**3 / x for x in seconds["matmul"].raw], "FLOP/s")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    bandwidth, flops = peak_bandwidth(name), peak_flops(name)
    if bandwidth is None or flops is None:
        return Limits(copy, matmul, copy.median, matmul.median, name, listed=False)
    return Limits(copy, matmul, bandwidth, flops, name, listed=True)


def peak_bandwidth(device_name: str) -> float | None:
    """Bytes a second of a GPU by its CUDA name, or None for one that the table does not have."""
    words = set(device_name.lower().replace("-", " ").split())
    known = [name for name in PEAK_BANDWIDTH if set(name.lower().split()) <= words]
    return PEAK_BANDWIDTH[max(known, key=len)] if known else None


def spread(samples: Samples) -> str:
    """The middle half of the samples."""
    return f"{samples.lower_quartile:.3g} - {samples.upper_quartile:.3g}"


def _scaled(samples: Samples, factor: float) -> Samples:
    return Samples.of([factor * value for value in samples.raw], samples.unit)
