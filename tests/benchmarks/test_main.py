"""``python -m benchmarks``: what it runs, what it writes, how it ends."""

import sys
import types

import pytest

from benchmarks import __main__ as command
from benchmarks.catalogue import Benchmark, read_pending, write_pending
from benchmarks.result import Result, Samples, Table, read_record
from hydra_dist.errors import ConfigError


def make_benchmark(name, needs_gpu=False, holds=True, settings=None, seen=None):
    module = types.ModuleType(name)
    module.SETTINGS = settings or {}

    def run(options):
        if seen is not None:
            seen.append((name, options.device, dict(options.settings)))
        return Result(
            holds=holds,
            finding="found",
            quantities={"time": Samples.of([1.0], "s")},
            table=Table(columns=("a",), rows=((1,),)),
        )

    module.run = run

    class InMemory(Benchmark):
        def load(self):
            return module

    return InMemory(name, f"{name} is fast.", needs_gpu, {"all": "one GPU"} if needs_gpu else {})


@pytest.fixture
def seen(monkeypatch):
    """Two benchmarks for the CPU and two for a GPU; the list of those that ran."""
    ran: list[tuple] = []
    made = [
        make_benchmark("alpha", settings={"steps": 3, "rate": 0.5, "deep": False}, seen=ran),
        make_benchmark("beta", holds=False, settings={"steps": 5}, seen=ran),
        make_benchmark("gamma", needs_gpu=True, seen=ran),
        make_benchmark("omega", needs_gpu=True, seen=ran),
    ]
    monkeypatch.setattr(command, "find_benchmarks", lambda: {benchmark.name: benchmark for benchmark in made})
    monkeypatch.setattr(command, "gpu_names", lambda: ())
    return ran


def test_a_claim_that_holds_is_written_and_ends_with_0(seen, tmp_path, capsys):
    assert command.main(["alpha", "--results", str(tmp_path)]) == 0
    record = read_record(tmp_path / "alpha.json")
    assert record.claim == "alpha is fast."
    assert record.settings == {"steps": 3, "rate": 0.5, "deep": False}
    assert "holds: found" in capsys.readouterr().out


def test_a_claim_that_does_not_hold_is_written_too_and_ends_with_1(seen, tmp_path, capsys):
    assert command.main(["--all", "--results", str(tmp_path)]) == 1
    assert not read_record(tmp_path / "beta.json").result.holds
    assert [name for name, *_ in seen] == ["alpha", "beta"]
    captured = capsys.readouterr()
    assert "gamma, omega" in captured.out  # what was left out is said
    assert "does not hold: beta" in captured.err


def test_settings_take_the_type_of_their_default(seen, tmp_path):
    changes = ["--set", "steps=7", "--set", "rate=2", "--set", "deep=true"]
    command.main(["alpha", "beta", "--results", str(tmp_path), *changes])
    assert seen[0][2] == {"steps": 7, "rate": 2.0, "deep": True}
    assert seen[1][2] == {"steps": 7}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["alpah"], 'alpah: unknown.*"alpha"'),
        (["alpha", "--set", "stpes=1"], 'stpes=1: unknown setting.*"steps"'),
        (["alpha", "--set", "steps"], "KEY=VALUE"),
        (["alpha", "--set", "steps=many"], "type int; 3 works"),
        (["alpha", "--set", "deep=1"], "true or false"),
        (["gamma"], "gamma needs a GPU; with --gpu"),
        (["--gpu"], "this machine has no GPU"),
        (["alpha", "--gpu"], "this machine has no GPU"),
    ],
)
def test_mistakes_are_told_before_anything_runs(seen, arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        command.main(arguments)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert seen == []


def test_gpu_measures_waiting_rows_first_and_takes_them_off_the_list(seen, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "gpu_names", lambda: ("NVIDIA H200",))
    assert command.main(["--gpu", "gamma", "--results", str(tmp_path)]) == 0
    assert [row.benchmark for row in read_pending(tmp_path)] == ["omega"]
    seen.clear()
    assert command.main(["--gpu", "--results", str(tmp_path)]) == 0
    assert [(name, device) for name, device, _ in seen] == [("omega", "cuda"), ("gamma", "cuda")]
    assert read_pending(tmp_path) == []
    assert read_record(tmp_path / "omega-nvidia-h200.json").device == "nvidia-h200"


def test_a_cpu_run_leaves_the_list_alone(seen, tmp_path):
    write_pending([], tmp_path)
    command.main(["alpha", "--results", str(tmp_path)])
    assert read_pending(tmp_path) == []


def test_list_and_table(seen, tmp_path, capsys):
    command.main(["alpha", "--results", str(tmp_path)])
    capsys.readouterr()
    assert command.main(["--list", "--results", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert "alpha (CPU; alpha.json)" in listed
    assert "waiting for one GPU: gamma all" in listed
    assert command.main(["--table", "--results", str(tmp_path)]) == 0
    assert "| a |\n| --- |\n| 1 |" in capsys.readouterr().out


def test_from_a_shell(run_command):
    listed = run_command([sys.executable, "-m", "benchmarks", "--list"])
    assert listed.returncode == 0
    assert "ring_ranks (CPU" in listed.stdout
    unknown = run_command([sys.executable, "-m", "benchmarks", "ring_rank"])
    assert unknown.returncode == 2
    assert unknown.stderr == 'error: benchmark ring_rank: unknown (did you mean "ring_ranks"?)\n'
    assert run_command([sys.executable, "-m", "benchmarks"]).returncode == 2
