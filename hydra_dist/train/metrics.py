"""What a run shows and keeps: a live display, ``metrics.jsonl``, TensorBoard events. Only the first rank has one."""

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hydra_dist.errors import RunError

LINES_APART_SECONDS = 10.0
"""Where the output is no terminal, a line this often takes the place of the live display."""


class Metrics:
    """Writes one record a step and shows the newest.

    Args:
        directory: the run's folder.
        first_step: the step the run goes on with; records from it on are another attempt's and are dropped.
        total_steps: where the run ends.
        log_every_steps: how often a record is shown and sent to TensorBoard; the file gets every step.
    """

    def __init__(
        self, directory: Path, first_step: int, total_steps: int, *, log_every_steps: int = 1, tensorboard: bool = True
    ) -> None:
        self.path = directory / "metrics.jsonl"
        kept = [record for record in read_metrics(self.path) if record["step"] < first_step]
        try:
            replaced = self.path.with_suffix(".jsonl.new")
            replaced.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            os.replace(replaced, self.path)
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error.strerror}") from None
        self.console = Console()
        self.log_every_steps = log_every_steps
        self._tensorboard = _tensorboard_writer(directory, first_step) if tensorboard else None
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[summary]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=first_step, summary="")
        self._total_steps = total_steps
        self._last_line = 0.0

    def __enter__(self) -> "Metrics":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def step(self, record: dict[str, Any]) -> None:
        """Keep and show one step's record; ``record["step"]`` counts from 0."""
        self._file.write(json.dumps(record) + "\n")
        step = record["step"]
        if step % self.log_every_steps and step + 1 != self._total_steps:
            return
        if self._tensorboard is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self._tensorboard.add_scalar(f"train/{name}", value, step)
        summary = summarise(record)
        self._progress.update(self._task, completed=step + 1, summary=summary)
        if not self.console.is_terminal:
            now = time.monotonic()
            if now - self._last_line >= LINES_APART_SECONDS or step + 1 == self._total_steps:
                self._last_line = now
                self.message(f"step {step + 1}/{self._total_steps}  {summary}")

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Send the evaluation after ``step`` steps to TensorBoard."""
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"evaluation/{name}", value, step)

    def message(self, text: str) -> None:
        """One line on the screen, above the live display."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def summarise(record: dict[str, Any]) -> str:
    """A record as one line: the loss first."""
    parts = [
        f"loss {record['loss']:.3f}",
        f"grad norm {record['grad_norm']:.2f}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"{record['step_seconds'] * 1e3:,.0f} ms/step",
        f"{record['memory_gib']:.2f} GiB {record['memory_metric']}",
    ]
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.1%}")
    return "  ".join(parts)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records in ``metrics.jsonl``, oldest first; a last line that was cut off by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _tensorboard_writer(directory: Path, first_step: int) -> Any:
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)
