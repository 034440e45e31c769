"""The shell scripts: linted, and tried in a copy of the checkout whose Python only notes what it is asked to do.

The stand-in for ``.venv/bin/python`` writes its arguments to a log and answers as the stand-in environment says; what
is plain arithmetic on files (reading a configuration, hashing) it passes on to the real Python.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted(ROOT.glob("launch/*.sh")), ROOT / ".ci" / "run"]

STAND_IN = """#!{python}
import json, os, sys
arguments = sys.argv[1:]
line = dict(arguments=arguments, cwd=os.getcwd(), omp=os.environ.get("OMP_NUM_THREADS"))
line["accelerator"] = os.environ.get("DS_ACCELERATOR")
with open(os.environ["STAND_IN_LOG"], "a") as log:
    log.write(json.dumps(line) + chr(10))
module = arguments[1] if arguments[:1] == ["-m"] else None
if module == "torch.distributed.run":
    sys.exit(int(os.environ.get("TORCHRUN_EXIT", 0)))
if module in ("pip", "pytest", "mypy", "ruff", "venv"):
    sys.exit(int(os.environ.get(module.upper() + "_EXIT", 0)))
if module == "hydra_dist.cli" and arguments[2] == "data":
    os.makedirs("data/stdlib")
    open("data/stdlib/manifest.json", "w").close()
    sys.exit(0)
if module == "hydra_dist.cli":
    sys.exit(int(os.environ.get("CHECK_EXIT", 0)))
if arguments[:1] == ["-c"] and "device_count" in arguments[1]:
    print(os.environ.get("GPUS", "0"))
    sys.exit(0)
os.execv({python!r}, [{python!r}, *arguments])
"""


class Checkout:
    """A copy of the scripts with a stand-in environment, in a folder with spaces in its name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log = root.parent / "log"
        self.venv = root / ".venv"
        for folder in ("launch", "configs"):
            shutil.copytree(ROOT / folder, root / folder)
        (root / ".ci").mkdir()
        shutil.copy(ROOT / ".ci" / "run", root / ".ci" / "run")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, root / name)
        python = self.venv / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(STAND_IN.format(python=sys.executable))
        python.chmod(0o755)

    def install(self) -> None:
        """As after launch/setup.sh."""
        parts = [(self.root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
        parts += [platform.python_version().encode(), str(self.root).encode()]
        digest = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
        (self.venv / "installed").write_text(digest + "\n")

    def start(self, script: str, *arguments: str, **answers: object) -> subprocess.Popen[str]:
        """Start a script from the root folder of the file system; ``answers`` are the stand-in's environment."""
        environment = {**os.environ, "STAND_IN_LOG": str(self.log), "PYTHONPATH": str(ROOT)}
        for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR", "PYTHON"):
            environment.pop(name, None)
        environment["PYTHON"] = sys.executable
        environment |= {name: str(answer) for name, answer in answers.items()}
        pipe = subprocess.PIPE
        command = [str(self.root / script), *arguments]
        return subprocess.Popen(command, cwd="/", env=environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, script: str, *arguments: str, **answers: object) -> subprocess.CompletedProcess[str]:
        """Run a script to its end."""
        process = self.start(script, *arguments, **answers)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def calls(self, module: str) -> list[dict]:
        """What ``python -m module`` was asked, each with the arguments after the module's name."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []
        asked = [line for line in lines if line["arguments"][:2] == ["-m", module]]
        return [{**line, "arguments": line["arguments"][2:]} for line in asked]


@pytest.fixture
def fresh(tmp_path):
    root = tmp_path / "a checkout" / "of hydra"
    root.mkdir(parents=True)
    return Checkout(root)


@pytest.fixture
def checkout(fresh):
    fresh.install()
    return fresh


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
    data, check = checkout.calls("hydra_dist.cli")
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
    assert f"{checkout.root}/a b" in done.stdout
    assert checkout.calls("pip") == []


def test_quickstart_reuses_the_corpus(checkout):
    for _ in range(2):
        assert checkout.run("launch/quickstart.sh").returncode == 0
    assert [call["arguments"][0] for call in checkout.calls("hydra_dist.cli")] == ["data", "check", "check"]


def test_another_corpus_is_not_prepared(checkout):
    assert checkout.run("launch/quickstart.sh", "data.directory=mine").returncode == 0
    assert [call["arguments"][0] for call in checkout.calls("hydra_dist.cli")] == ["check"]


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


def test_setup_installs_torch_first_and_stamps_last(fresh):
    done = fresh.run("launch/setup.sh")
    assert done.returncode == 0, done.stderr
    installs = [" ".join(call["arguments"]) for call in fresh.calls("pip")]
    assert len(installs) == 3
    assert installs[0].endswith("torch==2.13.0")
    assert all(name in installs[1] for name in ("setuptools", "wheel", "ninja", "packaging"))
    assert installs[2].endswith("--no-build-isolation -e .[test]")
    assert all("-c constraints.txt" in install for install in installs)
    assert fresh.calls("pip")[0]["cwd"] == str(fresh.root)
    assert fresh.run("launch/setup.sh").returncode == 0
    assert len(fresh.calls("pip")) == 3  # nothing the second time


def test_setup_that_failed_is_done_again(fresh):
    fresh.install()
    (fresh.root / "constraints.txt").write_text("torch==2.13.0\n# changed\n")
    assert fresh.run("launch/setup.sh", PIP_EXIT=1).returncode == 1
    assert not (fresh.venv / "installed").exists()
    assert fresh.run("launch/quickstart.sh", PIP_EXIT=1).returncode == 1
    assert fresh.calls("hydra_dist.cli") == []
    assert fresh.run("launch/setup.sh").returncode == 0
    assert (fresh.venv / "installed").exists()


def test_a_moved_checkout_is_set_up_again(checkout):
    moved = checkout.root.with_name("moved here")
    checkout.root.rename(moved)
    checkout.root = moved
    assert checkout.run("launch/setup.sh").returncode == 0
    assert len(checkout.calls("pip")) == 3


def test_two_setups_at_once_install_once(fresh):
    import fcntl

    with (fresh.venv / "setup.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        setups = [fresh.start("launch/setup.sh") for _ in range(2)]
        time.sleep(1.0)
        assert [setup.poll() for setup in setups] == [None, None]
        assert fresh.calls("pip") == []
    errors = [setup.communicate(timeout=60)[1] for setup in setups]
    assert [setup.returncode for setup in setups] == [0, 0]
    assert all("waiting for another setup" in error for error in errors)
    assert len(fresh.calls("pip")) == 3


def test_an_interpreter_that_is_too_old_is_named(fresh, tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\n[ \"$1\" = -V ] && echo 'Python 3.9.2' && exit\nexit 1\n")
    old.chmod(0o755)
    done = fresh.run("launch/setup.sh", PYTHON=old)
    assert done.returncode == 2
    assert f"PYTHON={old} is not a Python 3.11, 3.12 or 3.13" in done.stderr
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "cat", "mkdir", "env"):
        (tools / tool).symlink_to(shutil.which(tool))
    done = fresh.run("launch/setup.sh", PYTHON="", PATH=f"{tmp_path}:{tools}")
    assert done.returncode == 2
    assert "no Python 3.11, 3.12 or 3.13 on PATH (python3 is Python 3.9.2)" in done.stderr


def test_a_broken_environment_is_named_and_left(fresh):
    python = fresh.venv / "bin" / "python"
    python.unlink()
    python.symlink_to("/nowhere/python3")
    done = fresh.run("launch/setup.sh")
    assert done.returncode == 2
    assert f"remove {fresh.venv} and start again" in done.stderr
    assert python.is_symlink()


def test_an_environment_is_made_where_there_is_none(fresh, tmp_path):
    """The chosen interpreter makes it; a stand-in that cannot gives the reason."""
    shutil.rmtree(fresh.venv)
    maker = tmp_path / "python3.12"
    maker.write_text(STAND_IN.format(python=sys.executable))
    maker.chmod(0o755)
    done = fresh.run("launch/setup.sh", PYTHON=maker, VENV_EXIT=1)
    assert done.returncode == 2
    assert "cannot make a virtual environment" in done.stderr
    assert fresh.calls("venv")[0]["arguments"] == [str(fresh.venv)]


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
