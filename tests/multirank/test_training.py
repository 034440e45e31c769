"""Whole runs under torchrun: the same numbers on any number of ranks and at any ZeRO stage, and after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from hydra_dist.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20


def write(settings: dict[str, Any], path: Path, **changes: Any) -> Path:
    """``settings`` with ``section__key`` changes and a run folder of its own, as a YAML file."""
    settings = {section: dict(keys) for section, keys in settings.items()}
    settings["run"]["directory"] = str(path.with_suffix(""))
    for key, value in changes.items():
        section, _, name = key.partition("__")
        settings.setdefault(section, {})[name] = value
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.fixture
def settings(tiny_settings: dict[str, Any]) -> dict[str, Any]:
    """Packed documents, the peak learning rate from the first step on, and clipping that acts.

    At 5e-3 training amplifies rounding: one rank with other micro-batches then differs from itself by 2e-5.
    """
    return {
        **tiny_settings,
        "train": {"steps": STEPS, "device": "cpu", "precision": "fp32", "micro_batch_size": 2},
        "schedule": {"name": "constant", "warmup_steps": 0},
        "optimizer": {"learning_rate": 2e-3},
    }


def trained(torchrun: Any, config: Path, ranks: int, *overrides: str) -> list[dict[str, Any]]:
    done = torchrun(ranks, "-m", "hydra_dist.train", str(config), *overrides, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_metrics(config.with_suffix("") / "metrics.jsonl")


def largest_difference(records: list[dict[str, Any]], reference: list[dict[str, Any]], key: str) -> float:
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(records, reference, strict=True))


@pytest.fixture
def reference(torchrun: Any, settings: dict[str, Any], tmp_path: Path) -> list[dict[str, Any]]:
    return trained(torchrun, write(settings, tmp_path / "one.yaml", zero__stage=0), 1)


@pytest.mark.timeout(900)
def test_ranks_and_zero_stages_change_no_number(torchrun, settings, reference, tmp_path):
    assert reference[0]["loss"] - reference[-1]["loss"] > 0.5
    assert max(record["grad_norm"] for record in reference) > 1.0, "clipping never acted"
    for ranks, context, stage in ((2, 2, 0), (2, 2, 1), (2, 2, 2), (2, 2, 3), (4, 4, 1), (4, 2, 2), (2, 1, 3)):
        config = write(settings, tmp_path / f"{ranks}-{context}-{stage}.yaml", context__size=context, zero__stage=stage)
        # As many rows a step on any number of data replicas.
        records = trained(torchrun, config, ranks, f"train.micro_batch_size={2 * context // ranks}")
        for key in ("loss", "grad_norm"):
            difference = largest_difference(records, reference, key)
            assert difference < 1e-5, f"{key} of {config.stem} (ranks-context-stage) differs by {difference:.1e}"
        assert [r["targets"] for r in records] == [r["targets"] for r in reference]
    other = trained(torchrun, write(settings, tmp_path / "other.yaml", train__seed=1, zero__stage=0), 1)
    assert largest_difference(other, reference, "loss") > 1e-3, "the comparison cannot tell runs apart"


@pytest.mark.timeout(600)
def test_strategies_change_no_number(torchrun, settings, reference, tmp_path):
    for ranks, stage, context in (
        (4, 2, {"strategy": "hybrid", "ulysses_size": 2}),
        (2, 3, {"strategy": "ulysses", "layout": "contiguous"}),
        (2, 1, {"strategy": "all_gather", "layout": "balanced"}),
    ):
        changes = {f"context__{key}": value for key, value in context.items()}
        path = tmp_path / f"{context['strategy']}.yaml"
        records = trained(torchrun, write(settings, path, context__size=ranks, zero__stage=stage, **changes), ranks)
        for key in ("loss", "grad_norm"):
            assert largest_difference(records, reference, key) < 1e-5, (context, stage, key)


def test_micro_batches_change_no_number(torchrun, settings, reference, tmp_path):
    config = write(settings, tmp_path / "micro.yaml", train__micro_batch_size=1, train__gradient_accumulation_steps=2)
    records = trained(torchrun, config, 1)
    assert largest_difference(records, reference, "loss") < 1e-5
    assert largest_difference(records, reference, "grad_norm") < 1e-5


@pytest.mark.timeout(900)
def test_compiled_layers_change_no_number_under_zero(torchrun, settings, tmp_path):
    """A graph break would end the run: layers are compiled whole."""
    settings["train"]["steps"] = 4
    reference = trained(torchrun, write(settings, tmp_path / "plain.yaml", zero__stage=0), 1)
    for stage in (0, 1, 2):
        config = write(settings, tmp_path / f"{stage}.yaml", zero__stage=stage, context__size=2, train__compile=True)
        records = trained(torchrun, config, 2)
        for key in ("loss", "grad_norm"):
            assert largest_difference(records, reference, key) < 1e-5


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_goes_on_bit_for_bit(torchrun, settings, tmp_path, optimizer):
    common = {"context__size": 2, "optimizer__name": optimizer, "checkpoint__every_steps": 6, "zero__stage": 2}
    whole = trained(torchrun, write(settings, tmp_path / "whole.yaml", **common), 2)
    config = write(settings, tmp_path / "killed.yaml", **common)
    run = config.with_suffix("")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, "-m", "hydra_dist.train", str(config)],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 120
        while len(read_metrics(run / "metrics.jsonl")) < 9:  # between the checkpoints after 6 and after 12 steps
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    finally:
        for member in family or [psutil.Process(process.pid)]:
            member.send_signal(signal.SIGKILL)
        process.wait()
    reached = len(read_metrics(run / "metrics.jsonl"))
    assert 9 <= reached < STEPS, "the kill came too late to show anything"
    resumed = trained(torchrun, config, 2)
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in resumed] == [r[key] for r in whole]
    evaluations = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("whole", "killed")]
    assert evaluations[0] == evaluations[1]


def test_bf16_parameters_train_under_zero(torchrun, settings, tmp_path):
    config = write(settings, tmp_path / "bf16.yaml", train__precision="bf16", zero__stage=1, context__size=2)
    records = trained(torchrun, config, 2)
    assert records[0]["loss"] - records[-1]["loss"] > 0.5
    described = json.loads((config.with_suffix("") / "environment.json").read_text())
    assert "FP16" not in described["optimizer"], "DeepSpeed put its fp16 optimizer in the place of AdamW"
