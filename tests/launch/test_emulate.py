"""launch/emulate.sh: real processes on a CPU over gloo, and mistakes that end with 2 before one is started."""

import json
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = '#!/usr/bin/env bash\necho "$@" >>"$STAND_IN_LOG.commands"\nexec "{python}" -m hydra_dist.cli "$@"\n'


@pytest.fixture
def emulate(checkout, run_command):
    """``emulate(*arguments)``: run the script; the folder of the checkout has spaces in its name."""
    program = checkout.venv / "bin" / "hydra-dist"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    environment = {"STAND_IN_LOG": str(checkout.log), "PYTHONPATH": str(ROOT)}
    script = str(checkout.root / "launch" / "emulate.sh")
    return lambda *arguments: run_command([script, *arguments], timeout=200, env=environment, cwd="/")


def commands(checkout):
    """What hydra-dist was asked."""
    path = checkout.log.with_name("log.commands")
    return path.read_text().splitlines() if path.exists() else []


def test_two_processes_train_on_a_cpu(emulate, checkout, tiny_settings, tmp_path):
    tiny_settings["zero"] = {"stage": 2}
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_settings))
    done = emulate("2", str(config), "context.size=2", "train.steps=2", "schedule.warmup_steps=1")
    assert done.returncode == 0, done.stdout + done.stderr
    (command,) = commands(checkout)
    assert command.endswith("context.size=2 train.steps=2 schedule.warmup_steps=1 --processes 2")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in metrics if "loss" in record]
    assert len(losses) == 2
    assert losses[1] < losses[0] < 6.0
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["context"]["size"] == 2
    assert written["train"]["share_gpu"] is True
    assert list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "arguments", [[], ["2"], ["0", "c.yaml"], ["two", "c.yaml"], ["-1", "c.yaml"], ["1.5", "c.yaml"]]
)
def test_a_wrong_number_of_ranks_or_none_ends_with_2(emulate, checkout, arguments):
    done = emulate(*arguments)
    assert done.returncode == 2
    assert done.stderr == "usage: launch/emulate.sh RANKS CONFIG [section.key=value ...]\n"
    assert commands(checkout) == []


def test_a_wrong_setting_ends_with_2_and_starts_no_process(emulate, tiny_config, tmp_path):
    for wrong, words in (("context.size=3", "context.size 3"), ("train.stepz=2", "train.stepz: unknown key")):
        done = emulate("2", str(tiny_config), wrong)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
