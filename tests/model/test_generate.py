"""Sampling: what is drawn, from what, and when it ends."""

import pytest
import torch

from hydra_dist.errors import ConfigError
from hydra_dist.model import Transformer, generate, initialize
from hydra_dist.model.generate import _choose


@pytest.fixture
def model(model_config):
    model = Transformer(model_config(num_layers=1, init_std=0.3))
    initialize(model, 0)
    return model


def test_greedy_is_the_likeliest_token_of_the_full_forward(model):
    tokens = torch.randint(0, 37, (2, 5))
    expected = tokens
    for _ in range(8):
        with torch.no_grad():
            likeliest = model(expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, likeliest], dim=1)
    assert torch.equal(generate(model, tokens, 8, temperature=0), expected)


def test_the_seed_decides(model):
    tokens = torch.randint(0, 37, (2, 5))
    a, b, c = (generate(model, tokens, 20, temperature=2.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(a[:, :5], tokens)
    assert torch.equal(generate(model, tokens, 0), tokens)


def test_a_row_ends_with_the_stop_token_and_all_end_together(model):
    tokens = torch.randint(0, 37, (3, 5))
    free = generate(model, tokens, 30, temperature=3.0, seed=3)
    stop = int(free[0, 7])
    stopped = generate(model, tokens, 30, temperature=3.0, seed=3, stop_token=stop)
    new = stopped[:, 5:]
    for row, unstopped in zip(new, free[:, 5:], strict=True):
        ends = (row == stop).nonzero().flatten()
        if len(ends):
            first = int(ends[0])
            assert torch.equal(row[:first], unstopped[:first])
            assert (row[first:] == stop).all()
    single = generate(model, tokens[:1], 30, temperature=0, stop_token=int(generate(model, tokens[:1], 1, 0.0)[0, -1]))
    assert single.shape == (1, 6)


LOGITS = torch.log(torch.tensor([[0.5, 0.05, 0.3, 0.15], [0.1, 0.2, 0.3, 0.4]]))


def drawn(temperature=1.0, top_k=None, top_p=None, draws=4000):
    generator = torch.Generator().manual_seed(0)
    logits = LOGITS.repeat(draws, 1)
    chosen = _choose(logits, temperature, top_k, top_p, generator).view(draws, 2)
    return torch.stack([(chosen == token).double().mean(0) for token in range(4)], dim=1)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [[0.5, 0.05, 0.3, 0.15], [0.1, 0.2, 0.3, 0.4]]),
        ({"top_k": 1}, [[1, 0, 0, 0], [0, 0, 0, 1]]),
        ({"top_k": 2}, [[0.625, 0, 0.375, 0], [0, 0, 3 / 7, 4 / 7]]),
        ({"top_p": 0.79}, [[0.625, 0, 0.375, 0], [0, 2 / 9, 3 / 9, 4 / 9]]),
        ({"top_p": 0.81}, [[0.5 / 0.95, 0, 0.3 / 0.95, 0.15 / 0.95], [0, 2 / 9, 3 / 9, 4 / 9]]),
        ({"top_p": 1e-9}, [[1, 0, 0, 0], [0, 0, 0, 1]]),
        ({"top_p": 1.0}, [[0.5, 0.05, 0.3, 0.15], [0.1, 0.2, 0.3, 0.4]]),
        ({"top_k": 2, "top_p": 0.6}, [[1, 0, 0, 0], [0, 0, 3 / 7, 4 / 7]]),
        (
            {"temperature": 0.5},
            [[0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365, 0.0225 / 0.365], [1 / 30, 4 / 30, 0.3, 16 / 30]],
        ),
    ],
    ids=str,
)
def test_frequencies(settings, expected):
    frequencies = drawn(**settings)
    expected = torch.tensor(expected, dtype=torch.float64)
    assert (frequencies - expected).abs().max() < 0.03
    assert not frequencies[expected == 0].any()


def test_the_check_above_rejects_a_temperature_that_is_not_used():
    assert (drawn() - drawn(temperature=0.5)).abs().max() > 0.1


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"max_new_tokens": -1}, "max_new_tokens -1"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.long)}, "a prompt of shape"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings, said, model):
    with pytest.raises(ConfigError, match=said):
        generate(model, **{"tokens": torch.zeros(1, 1, dtype=torch.long), "max_new_tokens": 1, **settings})
