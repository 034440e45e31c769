"""What a run keeps: a metrics file that survives a kill, and pictures that are made from it."""

import json

import pytest

from hydra_dist.train.metrics import Metrics, read_metrics
from hydra_dist.train.plots import plot_loss, running_mean


def record(step):
    return {
        "step": step,
        "loss": 5.0 - step,
        "grad_norm": 1.0,
        "tokens": 64 * (step + 1),
        "tokens_per_second": 10.0,
        "step_seconds": 0.1,
        "memory_gib": 1.0,
        "memory_metric": "resident",
    }


def test_a_resumed_run_drops_what_it_is_about_to_repeat(tmp_path):
    with Metrics(tmp_path, 0, 4, tensorboard=False) as metrics:
        for step in range(3):
            metrics.step(record(step))
    with metrics.path.open("a") as file:
        file.write('{"step": 3, "loss": 1')  # cut off by a kill
    with Metrics(tmp_path, 2, 4, tensorboard=False) as metrics:
        assert [r["step"] for r in read_metrics(metrics.path)] == [0, 1]
        metrics.step({**record(2), "loss": 9.0})
    assert [r["loss"] for r in read_metrics(metrics.path)] == [5.0, 4.0, 9.0]


def test_tensorboard_gets_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(tmp_path, 0, 2) as metrics:
        metrics.step(record(0))
        metrics.step(record(1))
        metrics.evaluation(2, {"bits_per_byte": 1.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("train/loss")] == [5.0, 4.0]
    assert events.Scalars("evaluation/bits_per_byte")[0].step == 2


def test_the_running_mean_is_not_drawn_towards_its_start():
    assert running_mean([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert running_mean([0.0] * 50 + [1.0])[-1] < 0.1


def test_the_picture_is_drawn_with_and_without_an_evaluation(tmp_path):
    bins = [{"start": 0, "stop": 16, "loss": 3.0, "targets": 5}, {"start": 16, "stop": 32, "loss": None, "targets": 0}]
    evaluation = {"loss": 3.0, "loss_by_position": bins, "loss_by_context": bins}
    for name, result in (("a.png", None), ("b.png", evaluation)):
        plot_loss(tmp_path / name, [record(0), record(1)], json.loads(json.dumps(result)))
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.png").stat().st_size < (tmp_path / "b.png").stat().st_size
