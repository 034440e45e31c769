"""Rows of a table of ratios measured on a GPU, each with its bar, what was achieved, and its share of a limit."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import attention_peers as peers
from benchmarks.gpu_timing import Captured, Limits, compare, forward_and_backward, limits, spread
from benchmarks.harness import Options
from benchmarks.result import Cell, Samples
from hydra_dist.attention import backends
from hydra_dist.errors import RunError
from hydra_dist.model import CCGQA, GQA

COLUMNS = ("what", "bar", "ratio, median", "quartiles", "us", "compared with, us", "achieved", "of the limit")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    ratio: Samples | float
    bar: float | None
    """None: shown, not judged."""
    at_most: bool
    ours: float
    """Seconds; bytes where the ratio is one number and not samples."""
    theirs: float
    achieved: str = ""
    share: float | str = ""

    @property
    def median(self) -> float:
        """Of the ratio."""
        return self.ratio.median if isinstance(self.ratio, Samples) else self.ratio

    @property
    def holds(self) -> bool:
        """Whether the median is within its bar."""
        return self.bar is None or (self.median <= self.bar if self.at_most else self.median >= self.bar)

    def cells(self) -> tuple[Cell, ...]:
        """Under ``COLUMNS``."""
        bar = "-" if self.bar is None else f"{'<=' if self.at_most else '>='} {self.bar:g}"
        if isinstance(self.ratio, Samples):
            times = (spread(self.ratio), 1e6 * self.ours, 1e6 * self.theirs)
            return self.what, bar, self.median, *times, self.achieved, self.share
        return self.what, bar, self.median, "exact", f"{self.ours:,.0f} B", f"{self.theirs:,.0f} B", "", ""


class Measurement:
    """The settings, the chip's limits, and what was found so far."""

    def __init__(self, options: Options) -> None:
        self.settings, self.say = options.settings, options.say
        self.device = torch.device(options.device)
        self.dtype: torch.dtype = getattr(torch, str(options.settings["dtype"]))
        self.rounds, self.repeats = int(options.settings["rounds"]), int(options.settings["repeats"])
        self.limits: Limits = limits(
            self.device, int(options.settings["copy_bytes"]), int(options.settings["matmul_size"]), self.rounds
        )
        self.rows: list[Row] = []
        self.quantities: dict[str, Samples] = {"copy": self.limits.copy, "matrix product": self.limits.matmul}
        self.counts: dict[str, int] = {}
        self._fastest: dict[tuple[int, ...], str] = {}

    def random(self, *shape: int) -> Tensor:
        """Normal numbers that a gradient is wanted of."""
        return torch.randn(shape, device=self.device, dtype=self.dtype, requires_grad=True)

    def compare(self, what: str, work: dict[str, Captured]) -> tuple[dict[str, Samples], dict[str, Samples]]:
        """``gpu_timing.compare``, with the samples kept."""
        seconds, ratios = compare(work, self.rounds, self.device)
        self.quantities |= {f"{what}, {name}": samples for name, samples in seconds.items()}
        self.quantities |= {f"{what}, {name} over {next(iter(work))}": samples for name, samples in ratios.items()}
        return seconds, ratios

    def add(self, row: Row) -> None:
        """Put a line into the table, and say it."""
        self.rows.append(row)
        verdict = "" if row.bar is None else f" ({'within' if row.holds else 'MISSES'} {row.bar:g})"
        self.say(f"{row.what}: {row.median:.3g}{verdict}")

    def fastest_attention(self, layer: CCGQA | GQA, length: int, batch_size: int = 1) -> str:
        """The backend whose forward and backward is fastest for the layer's heads, of those that run here."""
        key = (batch_size, length, layer.num_query_heads, layer.num_key_heads, layer.head_dim)
        if key not in self._fastest:
            times = self._attention_times(*key)
            shown = ", ".join(f"{name} {1e6 * time:,.0f} us" for name, time in times.items())
            self.say(f"attention of {key[2]}/{key[3]} heads, {batch_size} x {length} tokens, both ways: {shown}")
            self._fastest[key] = min(times, key=lambda name: times[name])
        return self._fastest[key]

    def _attention_times(
        self, batch_size: int, length: int, num_query_heads: int, num_key_heads: int, head_dim: int
    ) -> dict[str, float]:
        q, k, v = (
            self.random(batch_size, length, heads, head_dim)
            for heads in (num_query_heads, num_key_heads, num_key_heads)
        )
        times: dict[str, float] = {}
        for name in backends():
            if name == "reference":  # its memory grows with the square of the sequence
                continue
            attend = peers.ours(name)
            try:
                step = forward_and_backward(lambda attend=attend: (attend(q, k, v),), [q, k, v])  # type: ignore[misc]
                work = {each: Captured([step], self.device, 2) for each in ("once", "again")}
                seconds, _ = compare(work, 3, self.device)
            except Exception as error:  # whatever a library raises, another may run
                self.say(f"attention backend {name} takes no part: {next(iter(str(error).splitlines()), error)}")
                continue
            times[name] = min(samples.median for samples in seconds.values())
        if not times:
            raise RunError("no attention backend ran the layer's heads; what was said of each stands above")
        return times
