"""The quickstart learns: held-out bits per byte of the standard library's source, in minutes, on two CPU cores.

Measured is what a person waits for after the installation: preparing the corpus, then launch/quickstart.sh to its end,
with its checks, its evaluation of every held-out row, its checkpoints and its sample. The seconds say nothing about
other machines; the bits do.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Options
from benchmarks.machine import ROOT
from benchmarks.result import Cell, Result, Samples, Setting, Table
from hydra_dist.errors import RunError

NEEDS_GPU = False
SETTINGS: dict[str, Setting] = {"bits_per_byte": 2.1, "seconds": 360.0, "picture": "benchmarks/results/quickstart.png"}
"""The bounds, and where the run's loss.png goes (from the root of the checkout; empty: nowhere)."""


def run(options: Options) -> Result:
    """Prepare, train and read the run back."""
    bound, seconds = float(options.settings["bits_per_byte"]), float(options.settings["seconds"])
    with tempfile.TemporaryDirectory(prefix="hydra-dist-benchmark-") as folder:
        data, directory = Path(folder) / "data", Path(folder) / "run"
        prepare = [sys.executable, "-m", "hydra_dist.cli", "data", "prepare", "--input", "stdlib"]
        preparing = _seconds([*prepare, "--output", str(data), "--tokenizer", "train:8192"])
        options.say(f"corpus prepared in {preparing:.0f} s")
        settings = [f"data.directory={json.dumps(str(data))}", f"run.directory={json.dumps(str(directory))}"]
        training = _seconds(["bash", str(ROOT / "launch" / "quickstart.sh"), *settings])
        options.say(f"trained, evaluated and sampled in {training:.0f} s")
        evaluation = json.loads((directory / "evaluation.json").read_text(encoding="utf-8"))
        lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [json.loads(line) for line in lines]
        if options.settings["picture"]:
            (ROOT / str(options.settings["picture"])).write_bytes((directory / "loss.png").read_bytes())
    rows: list[tuple[Cell, ...]] = [
        (f"{part['start']:,} to {part['stop'] - 1:,}", part["targets"], part["loss"])
        for part in evaluation["loss_by_context"]
        if part["targets"]
    ]
    bits, total = float(evaluation["bits_per_byte"]), preparing + training
    return Result(
        holds=bits <= bound and total <= seconds,
        finding=f"{bits:.3f} bits per byte (bound {bound}) over {evaluation['text_bytes']:,} held-out bytes, in "
        f"{total:.0f} s (bound {seconds:.0f}), {len(steps)} steps of {steps[0]['tokens']:,} tokens",
        quantities={
            "training loss": Samples.of([step["loss"] for step in steps], "nats per token"),
            "step": Samples.of([step["step_seconds"] for step in steps], "s"),
            "wait for data": Samples.of([step["data_seconds"] for step in steps], "s"),
            "preparing the corpus": Samples.of([preparing], "s"),
            "training, evaluation and sample": Samples.of([training], "s"),
            "bits per byte": Samples.of([bits], "bits per byte"),
        },
        counts={"steps": len(steps), "tokens": steps[-1]["tokens"], "held-out targets": evaluation["targets"]},
        table=Table(columns=("tokens of the document before", "held-out targets", "loss"), rows=tuple(rows)),
    )


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{' '.join(command)}\nended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - started
