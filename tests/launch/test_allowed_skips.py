"""A skipped test that tests/allowed_skips.txt does not name fails the run: tried on a suite of its own."""

import shutil
import sys
from pathlib import Path

import pytest

SUITE = """
import pytest

def test_passes(): ...

@pytest.mark.skip(reason="needs a moon [full]")
def test_marked(): ...

@pytest.mark.parametrize("n", [1, 2])
def test_skips_itself(n):
    if n == 2:
        pytest.skip("no luck")

@pytest.mark.xfail(reason="known")
def test_expected_to_fail(): assert False

@pytest.mark.full
def test_of_the_whole_grid(): assert False
"""
MODULE = 'import pytest\npytest.skip("needs a sun", allow_module_level=True)\n'
ALL = ["*::test_marked: needs a moon [full]", "*::test_skips_itself[2]: no *", "*/test_module.py: needs a sun"]


@pytest.fixture
def run_suite(tmp_path, run_command):
    tests = tmp_path / "tests"
    tests.mkdir()
    shutil.copy(Path(__file__).resolve().parents[1] / "conftest.py", tests)
    (tests / "test_suite.py").write_text(SUITE)
    (tests / "test_module.py").write_text(MODULE)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\naddopts = --import-mode=importlib\nmarkers = full: the whole grid\n"
    )

    def run(allowed, *arguments):
        (tests / "allowed_skips.txt").write_text("\n".join(["# a comment", "", *allowed]) + "\n")
        return run_command([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments], cwd=tmp_path)

    return run


def test_named_skips_pass(run_suite):
    done = run_suite(ALL)
    assert done.returncode == 0, done.stdout
    assert "2 passed, 3 skipped, 1 deselected, 1 xfailed" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("left_out", "offender"),
    [
        (0, "tests/test_suite.py::test_marked: needs a moon [full]"),
        (1, "tests/test_suite.py::test_skips_itself[2]: no luck"),
        (2, "tests/test_module.py: needs a sun"),
    ],
)
def test_a_skip_that_no_line_names_fails_and_is_shown(run_suite, left_out, offender):
    done = run_suite([line for number, line in enumerate(ALL) if number != left_out])
    assert done.returncode == 1
    shown = done.stdout.partition("not named in allowed_skips.txt")[2]
    assert [line for line in shown.splitlines() if line.startswith("tests/")] == [offender]
    assert " passed" in done.stdout.splitlines()[-1]


def test_another_reason_is_another_skip(run_suite):
    assert run_suite([ALL[0], "*::test_skips_itself*: bad luck", ALL[2]]).returncode == 1


def test_only_skips_is_a_failure_too(run_suite):
    assert run_suite([], "tests/test_module.py").returncode == 1


def test_a_real_failure_keeps_its_exit_code(run_suite):
    done = run_suite(ALL, "-m", "full")
    assert done.returncode == 1
    assert "1 failed" in done.stdout


def test_a_line_without_a_reason_is_refused(run_suite):
    done = run_suite(["tests/test_suite.py::test_marked"])
    assert done.returncode == 4
    assert "allowed_skips.txt:3" in done.stdout + done.stderr
