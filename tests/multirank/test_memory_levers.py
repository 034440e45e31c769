"""What saves activation memory, in whole runs under torchrun: no number changes at any ZeRO stage."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hydra_dist.train.metrics import read_metrics

WORKER = Path(__file__).with_name("memory_worker.py")
PLAIN = {"activation_checkpointing": "none"}
LEVERS = {"activation_checkpointing": "layer", "activation_offload": True, "mlp_tile_size": 23, "device": "auto"}


def trained(
    torchrun: Any, settings: dict[str, Any], path: Path, ranks: int, stage: int, env: Any = None, **train: Any
) -> Any:
    """The steps' records, and what the run wrote."""
    settings = {
        **settings,
        "run": {**settings["run"], "directory": str(path)},
        "zero": {"stage": stage},
        "context": {"size": ranks},
        "train": {**settings["train"], "steps": 5, **train},
    }
    config = path.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    done = torchrun(ranks, str(WORKER), str(config), env={"CUDA_VISIBLE_DEVICES": "", **(env or {})}, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_metrics(path / "metrics.jsonl"), done.stdout


def largest_difference(records: Any, reference: Any, key: str) -> float:
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(records, reference, strict=True))


@pytest.mark.timeout(900)
def test_levers_change_no_number_at_any_zero_stage(torchrun, tiny_settings, tmp_path):
    tiny_settings["optimizer"] = {"learning_rate": 2e-3}
    reference, said = trained(torchrun, tiny_settings, tmp_path / "reference", 1, 0, **PLAIN)
    assert "activations moved" not in said
    for stage in (2, 3):
        records, said = trained(torchrun, tiny_settings, tmp_path / str(stage), 2, stage, **LEVERS)
        assert "activations moved" in said
        for key in ("loss", "grad_norm"):
            assert largest_difference(records, reference, key) < 1e-5, f"{key} at stage {stage}"
    spoiled, _ = trained(torchrun, tiny_settings, tmp_path / "spoiled", 1, 0, {"SPOILED": "1"}, **LEVERS)
    assert largest_difference(spoiled, reference, "grad_norm") > 1e-4, "the comparison cannot tell what came back"


def test_offload_on_a_machine_without_a_gpu_ends_with_one_message(tiny_config, run_command):
    overrides = ["train.device=auto", "train.activation_checkpointing=layer", "train.activation_offload=true"]
    command = [sys.executable, "-m", "hydra_dist.train", str(tiny_config), *overrides]
    done = run_command(command, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert done.stderr.startswith("error: train.activation_offload true: this run is on a cpu device")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tiny_config.parent / "run" / "metrics.jsonl").exists()
