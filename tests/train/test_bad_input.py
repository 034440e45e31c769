"""A user's mistakes end before anything is started or written, in one message on one rank, with the right exit code."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hydra_dist.config.file import load_config
from hydra_dist.errors import ConfigError, RunError, UserError
from hydra_dist.train.preflight import preflight


def refused(config: Path, *overrides: str, world_size: int = 1, verify: bool = False) -> UserError:
    with pytest.raises(UserError) as caught:
        preflight(load_config(config, overrides), str(config), world_size, verify_data=verify)
    return caught.value


@pytest.fixture
def own_corpus(tiny_corpus: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(tiny_corpus, tmp_path / "corpus"))


@pytest.fixture
def finished_run(tiny_config: Path, run_command: Any) -> Path:
    done = run_command([sys.executable, "-m", "hydra_dist.train", str(tiny_config), "train.steps=1"])
    assert done.returncode == 0, done.stderr
    return tiny_config.parent / "run"


def test_a_good_configuration_passes_and_leaves_no_trace(tiny_config):
    prepared = preflight(load_config(tiny_config), str(tiny_config), 1, verify_data=True)
    assert prepared.model.vocab_size == prepared.train.dataset.vocab_size
    assert list((tiny_config.parent / "run").iterdir()) == []


def test_processes_that_make_no_whole_replica(tiny_config):
    error = refused(tiny_config, "context.size=2", world_size=3)
    assert isinstance(error, ConfigError)
    assert "context.size 2 does not divide the 3 processes; 2 or 4 processes, or context.size=1, work" in str(error)


def test_a_missing_corpus_names_the_command_that_makes_one(tiny_config):
    error = refused(tiny_config, "data.directory=/nowhere/at/all")
    assert isinstance(error, ConfigError)
    assert "/nowhere/at/all" in str(error)
    assert "hydra-dist data prepare" in str(error)


def test_a_vocabulary_too_small_for_the_tokenizer(tiny_config):
    error = refused(tiny_config, "model.vocab_size=100")
    assert "model.vocab_size 100 is smaller than the 258 entries" in str(error)
    load_config(tiny_config, ["model.vocab_size=258"])


def test_a_sequence_longer_than_the_corpus_names_the_longest_that_works(tiny_config):
    error = refused(tiny_config, "data.sequence_length=1M")
    longest = int(str(error).split("at most ")[1].split(" works")[0])
    preflight(load_config(tiny_config, [f"data.sequence_length={longest}"]), "x", 1)


def test_a_corrupt_shard_is_found_and_named(own_corpus, tiny_config):
    shard = next(own_corpus.glob("train-*.bin"))
    damaged = bytearray(shard.read_bytes())
    damaged[100] ^= 1
    shard.write_bytes(damaged)
    error = refused(tiny_config, f"data.directory={own_corpus}", verify=True)
    assert isinstance(error, RunError)
    assert shard.name in str(error)


def test_a_checkpoint_of_another_tokenizer(finished_run, tiny_config, tmp_path):
    from hydra_dist.data import prepare

    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / "text" / f"{number}.txt").write_text("the ring passes keys and values from rank to rank " * 20)
    prepare([tmp_path / "text"], tmp_path / "other", "train:280", eval_fraction=0.25)
    error = refused(tiny_config, f"data.directory={tmp_path / 'other'}")
    assert isinstance(error, ConfigError)
    assert "another tokenizer" in str(error)


def test_check_reads_the_checkpoint_that_a_run_would_go_on_from(finished_run, tiny_config):
    weights = next(finished_run.glob("checkpoints/step-*/weights-*"))
    damaged = bytearray(weights.read_bytes())
    damaged[-8] ^= 1
    weights.write_bytes(damaged)
    error = refused(tiny_config, verify=True)
    assert isinstance(error, RunError)
    assert weights.name in str(error)


def test_a_corpus_without_held_out_documents_trains(tiny_config, tmp_path, run_command):
    from hydra_dist.data import prepare

    (tmp_path / "book.txt").write_text("one book alone, and nothing to hold out of it\n" * 60)
    prepare([tmp_path / "book.txt"], tmp_path / "book", "byte")
    settings = [f"data.directory={tmp_path / 'book'}", "train.steps=1"]
    done = run_command([sys.executable, "-m", "hydra_dist.train", str(tiny_config), *settings])
    assert done.returncode == 0, done.stderr
    assert "nothing is evaluated" in done.stdout
    assert (tmp_path / "run" / "loss.png").exists()


def test_a_folder_that_cannot_be_written(tiny_config):
    blocked = tiny_config.parent / "file"
    blocked.write_text("in the way")
    error = refused(tiny_config, f"run.directory={blocked / 'run'}")
    assert isinstance(error, ConfigError)
    assert "run.directory" in str(error)
    assert blocked.read_text() == "in the way"


def test_a_disk_without_room_for_the_checkpoints(tiny_config, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    error = refused(tiny_config)
    assert isinstance(error, RunError)
    assert "GiB free" in str(error)


def test_checkpoints_of_another_model_or_damaged_ones(finished_run, tiny_config):
    error = refused(tiny_config, "optimizer.name=muon")
    assert "optimizer.name=adamw, or another run.directory, works" in str(error)
    error = refused(tiny_config, "model.num_layers=3")
    assert isinstance(error, ConfigError)
    assert "num_layers" in str(error)
    manifest = next(finished_run.glob("checkpoints/step-*/manifest.json"))
    manifest.write_text(manifest.read_text()[:-40])
    error = refused(tiny_config)
    assert isinstance(error, RunError)
    assert "manifest.json" in str(error)


@pytest.mark.parametrize(
    ("overrides", "exit_code", "words"),
    [
        (["train.stepz=3"], 2, 'train.stepz: unknown key (did you mean "steps"?)'),
        (["data.directory=/nowhere"], 2, "hydra-dist data prepare"),
        (["train.device=cuda"], 2, "no GPU"),
    ],
)
def test_the_process_says_one_thing_and_ends_with_the_code(tiny_config, run_command, overrides, exit_code, words):
    if words == "no GPU" and __import__("torch").cuda.is_available():
        overrides, words, exit_code = ["context.size=2"], "does not divide", 2
    done = run_command([sys.executable, "-m", "hydra_dist.train", str(tiny_config), *overrides])
    assert done.returncode == exit_code
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_a_damaged_checkpoint_ends_the_run_with_one_message(finished_run, tiny_config, run_command):
    weights = next(finished_run.glob("checkpoints/step-*/weights-*"))
    damaged = bytearray(weights.read_bytes())
    damaged[-8] ^= 1
    weights.write_bytes(damaged)
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()}
    done = run_command([sys.executable, "-m", "hydra_dist.train", str(tiny_config)])
    assert done.returncode == 1
    assert weights.name in done.stderr
    assert "Traceback" not in done.stderr
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()} == before


def test_under_torchrun_the_first_rank_alone_speaks(tiny_config, torchrun):
    done = torchrun(2, "-m", "hydra_dist.train", str(tiny_config), "context.size=4")
    assert done.returncode != 0
    assert done.stderr.count("does not divide the 2 processes") == 1
    assert "exitcode  : 2" in done.stderr


def test_check_and_train_refuse_before_torchrun_starts(tiny_config, run_command):
    for command in ("check", "train"):
        done = run_command(
            [sys.executable, "-m", "hydra_dist.cli", command, str(tiny_config), "context.size=2", "--processes", "3"]
        )
        assert done.returncode == 2
        assert done.stderr.strip().count("\n") == 0
        assert "does not divide the 3 processes" in done.stderr


def test_generate_without_a_checkpoint(tmp_path, run_command):
    done = run_command([sys.executable, "-m", "hydra_dist.cli", "generate", str(tmp_path / "no-run")])
    assert done.returncode == 2
    assert "no checkpoint" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_run_writes_what_the_readme_promises(finished_run, run_command):
    names = {path.name for path in finished_run.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "evaluation.json", "loss.png", "tokenizer.json", "checkpoints"}
    evaluation = json.loads((finished_run / "evaluation.json").read_text())
    assert evaluation["bits_per_byte"] > 0
    assert yaml.safe_load((finished_run / "config.yaml").read_text())["train"]["steps"] == 1
    done = run_command(
        [sys.executable, "-m", "hydra_dist.cli", "generate", str(finished_run), "--prompt", "the ring", "--tokens", "5"]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the ring")


def test_a_step_that_is_not_finite_ends_the_run_and_spoils_no_checkpoint(finished_run, tiny_config, run_command):
    names = sorted(path.name for path in finished_run.glob("checkpoints/step-*"))
    for stage in (0, 2):
        overrides = ["train.steps=4", f"zero.stage={stage}", "optimizer.learning_rate=1e30", "schedule.warmup_steps=0"]
        done = run_command([sys.executable, "-m", "hydra_dist.train", str(tiny_config), *overrides])
        assert done.returncode == 1
        assert "gradient norm" in done.stderr
        assert "Traceback" not in done.stderr
        assert sorted(path.name for path in finished_run.glob("checkpoints/step-*")) == names
        assert all("NaN" not in line for line in (finished_run / "metrics.jsonl").read_text().splitlines())


def test_a_resumed_run_has_to_read_the_same_rows(finished_run, tiny_config):
    error = refused(tiny_config, "train.seed=5")
    assert "train.seed is 5" in str(error)
    assert "train.seed=0, or another run.directory, works" in str(error)
    assert "data.sequence_length=128" in str(refused(tiny_config, "data.sequence_length=64"))
    error = refused(tiny_config, "train.micro_batch_size=3")
    assert "train.micro_batch_size=1 train.gradient_accumulation_steps=1 works" in str(error)
    assert "another run.directory works" in str(refused(tiny_config, world_size=2))
    preflight(load_config(tiny_config), str(tiny_config), 1)


def test_a_file_that_cannot_be_written_during_the_run_is_one_message(tiny_config, run_command):
    limited = f"ulimit -f 1; exec {sys.executable} -m hydra_dist.train {tiny_config}"  # files of at most 1,024 bytes
    done = run_command(["bash", "-c", limited])
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
