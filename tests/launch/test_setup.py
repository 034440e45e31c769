"""launch/setup.sh: what it installs in which order, when it does nothing, and what it says where it cannot."""

import fcntl
import shutil
import time


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
    fresh.place_stand_in(maker)
    done = fresh.run("launch/setup.sh", PYTHON=maker, VENV_EXIT=1)
    assert done.returncode == 2
    assert "cannot make a virtual environment" in done.stderr
    assert fresh.calls("venv")[0]["arguments"] == [str(fresh.venv)]
