"""Decoding with a cache gives the logits of the full forward."""

from itertools import pairwise

import pytest
import torch

from hydra_dist.model import DecodeState, Transformer, decode, initialize

KINDS = [
    {},
    {"attention": "gqa"},
    {"window": 5},
    {"window": 1},
    {"attention": "gqa", "window": 3},
    {"conv_kernel_sizes": (3, 4)},
    {"conv_kernel_sizes": (1, 1)},
    {"use_convs": False, "use_value_shift": False},
    {"use_convs": False},
    {"rope_fraction": 0.0},
]


def build(config, dtype):
    model = Transformer(config)
    initialize(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "tau")):  # start at zero, where they would hide mistakes
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
    return model.to(dtype)


def stepwise(model, tokens, cuts, spoil=None):
    state, parts = DecodeState(model), []
    for start, stop in pairwise(cuts):
        parts.append(decode(model, tokens[:, start:stop], state))
        if spoil is not None:
            spoil(state)
    assert state.length == cuts[-1]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_prefill_and_steps_give_the_logits_of_the_whole(changes, dtype, bound, model_config, relative_error):
    model = build(model_config(**changes), dtype)
    tokens = torch.randint(0, 37, (2, 30))
    with torch.no_grad():
        expected = model(tokens)
    cuts = [0, 11, 12, 13, 14, 15, 16, 17, 25, 26, 30]  # a prompt, single tokens, and longer pieces between
    assert relative_error(stepwise(model, tokens, cuts), expected) < bound
    assert relative_error(stepwise(model, tokens, list(range(31))), expected) < bound


@pytest.mark.parametrize("window", [None, 4])
def test_a_cache_that_grows_past_its_first_buffer(window, model_config, relative_error):
    model = build(model_config(window=window, num_layers=1), torch.float64)
    tokens = torch.randint(0, 37, (1, 150))
    with torch.no_grad():
        expected = model(tokens)
    cuts = [0, 3, *range(4, 151)]
    assert relative_error(stepwise(model, tokens, cuts), expected) < 1e-12


def test_with_a_window_the_cache_stays_small(model_config):
    model = build(model_config(window=4, num_layers=1), torch.float32)
    state = DecodeState(model)
    for _ in range(200):
        decode(model, torch.zeros(1, 1, dtype=torch.long), state)
    assert state.layers[0]._keys.shape[1] <= 64


def test_the_check_above_rejects_forgotten_rows_and_keys(model_config, relative_error):
    model = build(model_config(), torch.float64)
    tokens = torch.randint(0, 37, (2, 30))
    with torch.no_grad():
        expected = model(tokens)

    def forget_convolutions(state):
        state.layers[0]._rows[0].zero_()

    def forget_delayed_value(state):
        state.layers[0]._rows[1].zero_()

    def count_from_zero(state):
        state.length = 0

    for spoil in (forget_convolutions, forget_delayed_value):
        assert relative_error(stepwise(model, tokens, [0, 10, 30], spoil), expected) > 1e-4
    state = DecodeState(model)
    decode(model, tokens[:, :10], state)
    count_from_zero(state)
    assert relative_error(decode(model, tokens[:, 10:], state), expected[:, 10:]) > 1e-4


def test_no_gradient_is_recorded(model_config):
    model = build(model_config(), torch.float32)
    assert not decode(model, torch.zeros(1, 3, dtype=torch.long), DecodeState(model)).requires_grad
