"""What every test may use, and the rule that no test is skipped unless tests/allowed_skips.txt names it."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SECONDS_TO_END = 10.0
"""How long a process that is asked to end may take before it is killed."""

# Read by torch when it is imported, here and in processes that tests start: small tensors gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not any(Path("/dev").glob("nvidia[0-9]*")):
    # Read by triton when it is first imported, which any library may do: without a GPU kernels are interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.markexpr:
        config.option.markexpr = "not full"
    config.pluginmanager.register(SkipRule(HERE / "allowed_skips.txt"), "skip-rule")


class SkipRule:
    """Fails a session in which a test was skipped that no line ``NODE: REASON`` of the file names; * is any text."""

    def __init__(self, allowed: Path) -> None:
        self.allowed_file = allowed
        self.allowed = _read_allowed(allowed)
        self.offenders: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not hasattr(report, "wasxfail"):
            self._look_at(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._look_at(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.offenders and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.offenders:
            terminalreporter.section("skipped, and not named in allowed_skips.txt", red=True)
            for offender in self.offenders:
                terminalreporter.line(offender)

    def _look_at(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped:
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if not any(node.fullmatch(report.nodeid) and why.fullmatch(reason) for node, why in self.allowed):
            self.offenders.append(f"{report.nodeid}: {reason}")


def _read_allowed(path: Path) -> list[tuple[re.Pattern[str], re.Pattern[str]]]:
    allowed = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        node, separator, reason = line.partition(": ")
        if not separator or not reason.strip():
            raise pytest.UsageError(f"{path}:{number}: {line!r} is not of the form NODE: REASON")
        allowed.append((_pattern(node), _pattern(reason)))
    return allowed


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(part) for part in text.strip().split("*")), re.DOTALL)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Every test starts from the same seeds, whatever ran before it. Loads no library that the test has not."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def run_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_command(command, timeout=120, env=None, cwd=None)``: run it to its end, and leave no process behind.

    ``env`` is added to this process's. Where the time runs out, the test fails with what was written.
    """
    return _run


@pytest.fixture
def torchrun() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``torchrun(num_processes, *arguments, timeout=120, env=None, cwd=None)``: as ``run_command``, on the CPU.

    Such as ``torchrun(2, "-m", "hydra_dist.train", str(tiny_config))``.
    """

    def start(
        num_processes: int, *arguments: str, env: Mapping[str, str] | None = None, **settings: Any
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(num_processes), *arguments]
        return _run(command, env={"DS_ACCELERATOR": "cpu", **(env or {})}, **settings)

    return start


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of about 40,000 bytes in 64 documents, tokenized by bytes; some documents are held out."""
    from hydra_dist.data import prepare

    folder = tmp_path_factory.mktemp("tiny-corpus")
    source = folder / "text"
    source.mkdir()
    sentence = "the ring passes keys and values from rank to rank until every query has seen what it may see"
    words = sentence.split()
    chooser = random.Random(0)
    for number in range(64):
        text = " ".join(chooser.choice(words) for _ in range(chooser.randrange(20, 240)))
        (source / f"{number:02}.txt").write_text(text + ".\n", encoding="utf-8")
    prepare([source], folder / "corpus", "byte", eval_fraction=1 / 8)
    return folder / "corpus"


@pytest.fixture
def tiny_settings(tiny_corpus: Path, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """The settings of a run that trains in seconds on one CPU process; a test may change its copy."""
    return {
        "model": {"num_layers": 2, "hidden_size": 32, "head_dim": 8, "num_query_heads": 4, "num_key_heads": 2},
        "data": {"directory": str(tiny_corpus), "sequence_length": 128},
        "train": {"steps": 6, "device": "cpu", "precision": "fp32"},
        "schedule": {"warmup_steps": 2},
        "evaluate": {"max_rows": 2},
        "run": {"directory": str(tmp_path / "run"), "tensorboard": False},
    }


@pytest.fixture
def tiny_config(tiny_settings: dict[str, dict[str, Any]], tmp_path: Path) -> Path:
    """``tiny_settings`` as a YAML file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_settings, sort_keys=False), encoding="utf-8")
    return path


def _run(
    command: Sequence[str], timeout: float = 120.0, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
        cwd=cwd or ROOT,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _end(process.pid)
        out, err = process.communicate()
        pytest.fail(f"{' '.join(command)}\ntook more than {timeout} s:\n{out}\n{err}")
    except BaseException:
        _end(process.pid)
        raise
    return subprocess.CompletedProcess(list(command), process.returncode, out, err)


def _end(pid: int) -> None:
    """End a process and everything it started; torchrun's workers lead process groups of their own."""
    family = list(_family(pid))
    for ask in (signal.SIGTERM, signal.SIGKILL):
        for process in family:
            try:
                process.send_signal(ask)
            except psutil.NoSuchProcess:
                continue
        _, family = psutil.wait_procs(family, timeout=SECONDS_TO_END)


def _family(pid: int) -> Iterator[psutil.Process]:
    try:
        leader = psutil.Process(pid)
        yield leader
        yield from leader.children(recursive=True)
    except psutil.NoSuchProcess:
        return
