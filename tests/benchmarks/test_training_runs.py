"""Benchmarks that compare training runs: what they start, and that their verdict can be no."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import ring_ranks, training_runs, window_control
from benchmarks.harness import Options
from benchmarks.training_runs import Run, relative_differences, train
from hydra_dist.errors import ConfigError, RunError

CONFIG = "configs/quickstart.yaml"


def options(module, **changes):
    return Options(device="cpu", settings={**module.SETTINGS, **changes}, say=lambda text: None)


@pytest.fixture
def torchrun_calls(monkeypatch, tmp_path):
    """torchrun's place is taken by a function that writes what a run writes; the corpus is there."""
    calls = []

    def start(command, **settings):
        calls.append((command, settings))
        folder = next(part.removeprefix("run.directory=") for part in command if part.startswith("run.directory="))
        directory = Path(json.loads(folder))
        directory.mkdir(parents=True)
        (directory / "metrics.jsonl").write_text('{"step": 0, "loss": 2.0}\n{"step": 1, "loss": 1.5}\n')
        (directory / "evaluation.json").write_text('{"bits_per_byte": 3.0}')
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(training_runs.subprocess, "run", start)
    monkeypatch.setattr(training_runs, "_require_corpus", lambda config, directory: None)
    return calls


def test_train_starts_torchrun_and_reads_the_run(torchrun_calls):
    found = train(CONFIG, {"train.steps": 50}, processes=2)
    assert found.column("loss") == [2.0, 1.5]
    assert found.evaluation == {"bits_per_byte": 3.0}
    ((command, settings),) = torchrun_calls
    assert command[1:8] == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "hydra_dist.train",
    ]
    assert command[8] == CONFIG
    assert {"train.steps=50", "train.device=cpu"} <= set(command)
    assert settings["env"]["DS_ACCELERATOR"] == "cpu"
    folder = json.loads(command[-1].removeprefix("run.directory="))
    assert not Path(folder).exists()  # nothing is left behind


def test_train_refuses_a_wrong_setting_before_it_starts(torchrun_calls):
    with pytest.raises(ConfigError, match=r"train.stepz: unknown key"):
        train(CONFIG, {"train.stepz": 50}, processes=2)
    assert torchrun_calls == []


REPORT = "\nE1120 22:36:48 1 torch/elastic/api.py:1] failed (exitcode: 1) local_rank: 0\nTraceback\n  main()"


@pytest.mark.parametrize("report", ["", REPORT])
def test_a_failed_run_shows_the_last_lines_of_its_ranks(torchrun_calls, monkeypatch, report):
    failed = subprocess.CompletedProcess([], 1, "", "\n".join(f"line {n}" for n in range(100)) + report)
    monkeypatch.setattr(training_runs.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RunError, match=r"exit code 1:\nline 70\n") as caught:
        train(CONFIG, {}, processes=1)
    assert str(caught.value).endswith("line 99")


def test_a_missing_corpus_names_the_command(monkeypatch, tmp_path):
    (tmp_path / "configs").mkdir()
    text = (training_runs.ROOT / CONFIG).read_text()
    (tmp_path / CONFIG).write_text(text)
    monkeypatch.setattr(training_runs, "ROOT", tmp_path)
    with pytest.raises(ConfigError, match=r"data/stdlib: no corpus there; hydra-dist data prepare --input stdlib"):
        train(CONFIG, {}, processes=1)


def test_relative_differences():
    assert relative_differences([1.0, 2.0, -3.0], [1.0, 4.0, 3.0]) == [0.0, 0.5, 2.0]
    with pytest.raises(ValueError, match="zip"):
        relative_differences([1.0], [1.0, 2.0])


def fake_losses(drift_at=None, control=True, fall=0.5):
    """``train`` as the ring benchmark sees it: equal runs, but for one that drifts, and for another seed."""

    def fake(config, overrides, processes, device):
        factor = 1.1 if control and overrides["train.seed"] else 1.0
        factor += 1e-3 if drift_at == (overrides["context.size"], overrides["zero.stage"]) else 0.0
        losses = (2.0 + fall, 2.0 + fall / 2, 2.0)
        return Run([{"loss": loss * factor, "grad_norm": 1.0 * factor} for loss in losses], {})

    return fake


@pytest.mark.parametrize(
    ("train", "holds"),
    [
        (fake_losses(), True),
        (fake_losses(drift_at=(4, 3)), False),
        (fake_losses(drift_at=(1, 2)), False),
        (fake_losses(fall=0.4), False),
        (fake_losses(control=False), False),  # a check that cannot tell another seed proves nothing
    ],
)
def test_ring_ranks_judges(monkeypatch, train, holds):
    monkeypatch.setattr(ring_ranks, "train", train)
    result = ring_ranks.run(options(ring_ranks))
    assert result.holds is holds
    assert len(result.table.rows) == 13  # 3 numbers of ranks x 4 stages but the reference, rounding, and the control
    assert len(result.quantities["loss difference, 4 ranks, ZeRO 3"].raw) == 3


def evaluation(bits, far):
    bins = [
        {"start": 0, "stop": 64, "loss": 9.0, "targets": 100},
        {"start": 64, "stop": 128, "loss": far, "targets": 30},
        {"start": 128, "stop": 256, "loss": far + 1, "targets": 10},
        {"start": 256, "stop": 512, "loss": None, "targets": 0},
    ]
    return {"bits_per_byte": bits, "loss_by_context": bins}


@pytest.mark.parametrize(
    ("costs", "holds"),
    [
        ((0.1, 0.2, 0.05), True),
        ((0.015, 0.2, 0.1), False),  # worse in every seed, but no further than seeds are apart
    ],
)
def test_window_control_judges(monkeypatch, costs, holds):
    order = []

    def fake(config, overrides, processes, device):
        seed, windowed = overrides["train.seed"], overrides.get("model.window") == 64
        order.append((seed, windowed))
        return Run([], evaluation(2.0 + 0.01 * (seed - 3) + costs[seed - 3] * windowed, 1.0 + windowed))

    monkeypatch.setattr(window_control, "train", fake)
    result = window_control.run(options(window_control))
    assert order == [(3, True), (3, False), (4, False), (4, True), (5, True), (5, False)]
    assert result.holds is holds
    assert result.quantities["cost of the window, seed by seed"].raw == pytest.approx(costs)
    assert [row[-1] for row in result.table.rows] == pytest.approx([1.25, 2.25])


def test_loss_after_weighs_bins_by_their_targets():
    assert window_control.loss_after(evaluation(0.0, 1.0), 64) == pytest.approx((30 * 1.0 + 10 * 2.0) / 40)
    assert window_control.loss_after(evaluation(0.0, 1.0), 65) == 2.0
    with pytest.raises(ValueError, match="no target"):
        window_control.loss_after(evaluation(0.0, 1.0), 256)
