"""The learning rate at its corners: first step, peak, last step."""

import itertools

import pytest

from hydra_dist.config import ScheduleConfig
from hydra_dist.train.schedule import learning_rate_factor


def factors(total, **settings):
    schedule = ScheduleConfig(**settings)
    return [learning_rate_factor(schedule, step, total) for step in range(total)]


def test_warm_up_is_linear_and_ends_at_the_peak():
    values = factors(10, name="constant", warmup_steps=4)
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert values[5:] == [1.0] * 5


def test_cosine_falls_from_the_peak_to_the_final_fraction():
    values = factors(101, name="cosine", warmup_steps=0, final_fraction=0.1)
    assert values[0] == 1.0
    assert values[50] == pytest.approx(0.55)
    assert values[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(values))


def test_wsd_holds_the_peak_and_then_falls_linearly():
    values = factors(100, name="wsd", warmup_steps=0, decay_fraction=0.2, final_fraction=0.0)
    assert values[:80] == [1.0] * 80
    assert values[-1] == pytest.approx(0.0)
    assert values[89] == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_a_run_of_one_step_learns(name):
    assert factors(1, name=name, warmup_steps=0)[0] > 0
