"""The scripts that a person or CI starts: linted, and tried on stand-ins from another directory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted(ROOT.glob("launch/*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_linted_and_strict(script):
    linter = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([linter, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert "\nset -euo pipefail\n" in script.read_text()
    assert os.access(script, os.X_OK)


def test_the_linter_rejects_an_unquoted_path(tmp_path):
    bad = tmp_path / "bad.sh"
    bad.write_text('#!/usr/bin/env bash\ncd $1 && rm -r "$2"\n')
    linter = Path(sys.executable).with_name("shellcheck")
    assert subprocess.run([linter, bad], capture_output=True).returncode == 1


def test_quickstart_prepares_checks_and_trains_on_two_processes(checkout):
    done = checkout.run("launch/quickstart.sh", "train.steps=50", 'run.directory="a b"')
    assert done.returncode == 0, done.stderr
    data, check, sample = checkout.calls("hydra_dist.cli")
    assert data["arguments"] == [
        *("data", "prepare", "--input", "stdlib"),
        *("--output", "data/stdlib", "--tokenizer", "train:8192"),
    ]
    settings = ["train.steps=50", 'run.directory="a b"']
    assert check["arguments"] == ["check", "configs/quickstart.yaml", "--processes", "2", *settings]
    (torchrun,) = checkout.calls("torch.distributed.run")
    start = ["--standalone", "--nproc-per-node", "2", "-m", "hydra_dist.train", "configs/quickstart.yaml"]
    assert torchrun["arguments"] == start + settings
    assert torchrun["cwd"] == str(checkout.root)
    assert torchrun["omp"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert torchrun["accelerator"] == "cpu"
    assert sample["arguments"][:2] == ["generate", f"{checkout.root}/a b"]
    for name in ("loss.png", "evaluation.json", "metrics.jsonl", "checkpoints"):
        assert f"{checkout.root}/a b/{name}" in done.stdout
    assert checkout.calls("pip") == []


def test_quickstart_reuses_the_corpus(checkout):
    for _ in range(2):
        assert checkout.run("launch/quickstart.sh").returncode == 0
    assert [call["arguments"][0] for call in checkout.calls("hydra_dist.cli")] == ["data", *["check", "generate"] * 2]


def test_another_corpus_is_not_prepared(checkout):
    assert checkout.run("launch/quickstart.sh", "data.directory=mine").returncode == 0
    assert [call["arguments"][0] for call in checkout.calls("hydra_dist.cli")] == ["check", "generate"]


def test_context_follows_the_gpus_and_what_is_typed_wins(checkout):
    assert checkout.run("launch/quickstart.sh", "context.size=4", GPUS=8).returncode == 0
    (torchrun,) = checkout.calls("torch.distributed.run")
    assert torchrun["arguments"][2] == "8"
    assert torchrun["arguments"][-2:] == ["context.size=8", "context.size=4"]
    assert (torchrun["omp"], torchrun["accelerator"]) == (None, None)


def test_the_cpu_of_a_machine_with_gpus(checkout):
    assert checkout.run("launch/quickstart.sh", "train.device=cpu", GPUS=8).returncode == 0
    (torchrun,) = checkout.calls("torch.distributed.run")
    assert torchrun["arguments"][2] == "2"
    assert torchrun["accelerator"] == "cpu"


def test_a_wrong_key_ends_with_2_before_anything_is_done(checkout):
    done = checkout.run("launch/quickstart.sh", "train.stepz=5")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "train.stepz: unknown key" in done.stderr
    assert "Traceback" not in done.stderr
    assert checkout.calls("hydra_dist.cli") == checkout.calls("torch.distributed.run") == []


@pytest.mark.parametrize("code", [1, 2])
def test_what_check_refuses_starts_no_torchrun(checkout, code):
    assert checkout.run("launch/quickstart.sh", CHECK_EXIT=code).returncode == code
    assert checkout.calls("torch.distributed.run") == []


def test_exit_code_of_torchrun_is_passed_on(checkout):
    assert checkout.run("launch/quickstart.sh", TORCHRUN_EXIT=7).returncode == 7


@pytest.mark.parametrize(("step", "starts"), [(260, 0), (100, 1)])
def test_a_finished_run_says_so_and_an_interrupted_one_goes_on(checkout, step, starts):
    run = checkout.root / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "evaluation.json").write_text(json.dumps({"step": step}))
    done = checkout.run("launch/quickstart.sh", "run.directory=runs/mine", "train.steps=260")
    assert done.returncode == 0
    assert len(checkout.calls("torch.distributed.run")) == starts
    assert ("finished already" in done.stdout) is (starts == 0)
    assert str(run) in done.stdout


def test_test_script_and_ci_pass_arguments_and_exit_codes(checkout):
    assert checkout.run("launch/test.sh", "-k", "a b", PYTEST_EXIT=5).returncode == 5
    assert checkout.calls("pytest")[0]["arguments"] == ["-k", "a b"]
    assert checkout.calls("pytest")[0]["cwd"] == str(checkout.root)
    assert checkout.run(".ci/run").returncode == 0
    assert [call["arguments"] for call in checkout.calls("ruff")] == [["check", "."], ["format", "--check", "."]]
    assert len(checkout.calls("mypy")) == 1
    assert len(checkout.calls("pytest")) == 2


@pytest.mark.parametrize("tool", ["RUFF", "MYPY"])
def test_ci_stops_at_the_first_finding(checkout, tool):
    assert checkout.run(".ci/run", **{f"{tool}_EXIT": 1}).returncode == 1
    assert checkout.calls("pytest") == []
