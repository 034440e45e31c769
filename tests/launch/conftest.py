"""A copy of the checkout's scripts whose Python only notes what it is asked to do.

The stand-in for ``.venv/bin/python`` writes its arguments to a log and answers as its environment says; what is plain
arithmetic on files (reading a configuration, hashing) it passes on to the real Python.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

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
        (self.venv / "bin").mkdir(parents=True)
        self.place_stand_in(self.venv / "bin" / "python")

    def place_stand_in(self, path: Path) -> None:
        """Write the stand-in for Python to ``path``."""
        path.write_text(STAND_IN.format(python=sys.executable))
        path.chmod(0o755)

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
