"""The command line: help without heavy imports, several inputs after one option, errors in one line."""

import subprocess
import sys

import pytest

from hydra_dist.cli import repeat_option


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("data prepare --input a b --output c", "data prepare --input a --input b --output c"),
        ("data prepare --output c --input a", "data prepare --output c --input a"),
        ("data prepare --input a --input b c", "data prepare --input a --input b --input c"),
        ("data prepare --input a --skip-undecodable", "data prepare --input a --skip-undecodable"),
        ("data prepare --input", "data prepare --input"),
        ("check x.yaml a.b=1", "check x.yaml a.b=1"),
    ],
)
def test_several_values_after_one_option(typed, read):
    assert repeat_option(typed.split(), "--input") == read.split()


def test_several_inputs_are_prepared_together(tmp_path, run_command):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"the text of {name}\n" * 40)
    command = [sys.executable, "-m", "hydra_dist.cli", "data", "prepare", "--tokenizer", "byte", "--eval-fraction", "0"]
    done = run_command([*command, "--input", "a.txt", "b.txt", "--output", "out"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 documents" in done.stdout + done.stderr


def test_a_missing_input_is_one_line_and_exit_code_2(tmp_path, run_command):
    command = [sys.executable, "-m", "hydra_dist.cli", "data", "prepare", "--input", "nowhere.txt", "--output", "out"]
    done = run_command(command, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "nowhere.txt" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_help_loads_no_torch():
    program = "import sys; sys.argv = ['hydra-dist', '--help']\nfrom hydra_dist.cli import main\n"
    program += "try:\n    main()\nexcept SystemExit:\n    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "False"
    for command in ("check", "train", "generate", "data"):
        assert command in done.stdout
