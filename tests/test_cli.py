"""The command line: help without heavy imports, several inputs after one option, errors in one line."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hydra_dist.cli import app, repeat_option
from hydra_dist.config import ModelConfig
from hydra_dist.model import Transformer
from hydra_dist.model.interop import CONFIG, new_folder, to_hugging_face, write_json, write_weights
from hydra_dist.model.interop.files import WEIGHTS


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
    for command in ("check", "train", "generate", "data", "export", "import"):
        assert command in done.stdout


@pytest.fixture
def llama_folder(tmp_path):
    """A small llama in Hugging Face's names."""
    model = ModelConfig(
        vocab_size=19, num_layers=1, hidden_size=16, head_dim=4, num_query_heads=4, num_key_heads=2,
        attention="gqa", rope_fraction=1.0,
    )  # fmt: skip
    exported = to_hugging_face(model, dict(Transformer(model).named_parameters()))
    with new_folder(tmp_path / "llama") as folder:
        write_weights(folder, exported.tensors, 10**9)
        write_json(folder / CONFIG, exported.config)
    return tmp_path / "llama"


def test_import_and_export_give_the_same_weights(llama_folder, tmp_path):
    runner = CliRunner()
    done = runner.invoke(app, ["import", str(llama_folder), "--output", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert "model.yaml" in done.output
    done = runner.invoke(
        app, ["export", str(tmp_path / "run"), "--output", str(tmp_path / "back"), "--checkpoint", "0"]
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (llama_folder / WEIGHTS).read_bytes()


def test_a_folder_that_cannot_be_imported_is_one_line_and_exit_code_2(llama_folder, tmp_path, run_command):
    (llama_folder / CONFIG).write_text('{"model_type": "lama"}')
    command = [sys.executable, "-m", "hydra_dist.cli", "import", "llama", "--output", "run"]
    done = run_command(command, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: llama/config.json: model_type is 'lama'")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
