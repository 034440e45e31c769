"""What the shared fixtures promise: ports are free, processes end, a tiny run has data."""

import socket
import sys
import time

import psutil
import pytest


def test_free_port_can_be_listened_on(free_port):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port))


def test_run_command_gives_exit_code_and_output(run_command):
    done = run_command([sys.executable, "-c", "import os, sys; print(os.environ['A']); sys.exit(3)"], env={"A": "b"})
    assert (done.returncode, done.stdout) == (3, "b\n")


def test_a_command_that_takes_too_long_ends_with_all_its_children(run_command, tmp_path):
    """The child leads a session of its own, as torchrun's workers do, and ignores the request to end."""
    child = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    )
    parent = (
        "import pathlib, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True, stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    started = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run_command.__globals__, "SECONDS_TO_END", 0.5)
        with pytest.raises(pytest.fail.Exception, match=r"took more than 6 s"):
            run_command([sys.executable, "-c", parent], timeout=6)
    assert time.monotonic() - started < 20
    pid = int((tmp_path / "pid").read_text())
    # Where nobody collects orphans, a killed one stays in the table as a zombie.
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_torchrun_starts_ranks_and_passes_its_exit_code(torchrun, tmp_path):
    script = tmp_path / "rank.py"
    # One write a line: the ranks share a pipe.
    line = "f\"rank {os.environ['RANK']} {os.environ['DS_ACCELERATOR']}\\n\""
    script.write_text(f"import os\nos.write(1, {line}.encode())\n")
    done = torchrun(2, str(script))
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")[:2]) == ["rank 0 cpu", "rank 1 cpu"]
    script.write_text("import sys\nsys.exit(2)\n")
    assert torchrun(1, str(script)).returncode == 1


def test_tiny_config_is_a_run_that_can_start(tiny_config):
    from hydra_dist.config.file import load_config
    from hydra_dist.data import Dataset, Sampler

    config = load_config(tiny_config)
    for split in ("train", "eval"):
        sampler = Sampler(Dataset(config.data.directory, split), config.data.sequence_length, seed=0)
        assert sampler.num_rows > 2
