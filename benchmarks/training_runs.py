"""Training runs as a person starts them: torchrun in a process of its own, and what the run wrote read back."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, available_cores
from hydra_dist.config.file import load_config
from hydra_dist.errors import ConfigError, RunError

SHOWN_LINES = 30


@dataclass(frozen=True)
class Run:
    """What a finished run wrote."""

    steps: list[dict[str, Any]]
    """One record a step, of ``metrics.jsonl``."""
    evaluation: dict[str, Any]

    def column(self, key: str) -> list[float]:
        """One value of every step, such as ``loss``."""
        return [float(record[key]) for record in self.steps]


def train(config: str, overrides: Mapping[str, object], processes: int, device: str = "cpu") -> Run:
    """Train from the start in a folder that is removed afterwards.

    Args:
        config: path of the YAML file, from the root of the checkout.
        overrides: ``section.key`` to value, without ``run.directory``.
        processes: ranks on this machine.
        device: ``cpu`` or ``cuda``.

    Raises ConfigError where the configuration is refused or the corpus is not there, RunError where the run fails.
    """
    with tempfile.TemporaryDirectory(prefix="hydra-dist-benchmark-") as folder:
        directory = Path(folder) / "run"
        settings = {
            "train.device": device,
            "run.tensorboard": "false",
            "checkpoint.keep": 1,
            **overrides,
            # As a YAML string, whatever the folder is called.
            "run.directory": json.dumps(str(directory)),
        }
        arguments = [f"{key}={value}" for key, value in settings.items()]
        _require_corpus(config, load_config(ROOT / config, arguments).data.directory)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["-m", "hydra_dist.train", config, *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, available_cores() // processes))}
        if device == "cpu":
            environment["DS_ACCELERATOR"] = "cpu"
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            last = "\n".join(_words_of_the_ranks(done.stdout + done.stderr)[-SHOWN_LINES:])
            raise RunError(f"{' '.join(command)}\nended with exit code {done.returncode}:\n{last}")
        lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        evaluation = json.loads((directory / "evaluation.json").read_text(encoding="utf-8"))
        return Run([json.loads(line) for line in lines], evaluation)


def _words_of_the_ranks(output: str) -> list[str]:
    """What the processes wrote, without the report that torchrun adds about its own stack."""
    lines = output.splitlines()
    ends = [number for number, line in enumerate(lines) if "] failed (exitcode: " in line]
    return lines[: ends[0]] if ends else lines


def _require_corpus(config: str, directory: str) -> None:
    if not (ROOT / directory / "manifest.json").exists():
        raise ConfigError(
            f"{config}: data.directory {directory}: no corpus there; "
            f"hydra-dist data prepare --input stdlib --output {directory} --tokenizer train:8192 makes it"
        )


def relative_differences(a: list[float], b: list[float]) -> list[float]:
    """|a - b| / |b|, step by step. ValueError where one has more steps."""
    return [abs(x - y) / abs(y) for x, y in zip(a, b, strict=True)]
