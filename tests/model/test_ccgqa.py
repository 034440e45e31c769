"""CCGQA against the same layer written row by row, with every switch, and wrong layers that the comparison rejects."""

import itertools
from dataclasses import replace

import pytest
import torch

from hydra_dist.context import ContextParallel
from hydra_dist.errors import ConfigError
from hydra_dist.model import CCGQA, ccgqa_reference, convolution, prologue_plain
from hydra_dist.model.prologue import Prologue

DOCUMENTS = torch.tensor([[0, 1, 2, 2, 2, 5, 5, 5, 5], [0, 0, 0, 3, 4, 4, 6, 6, 8]])  # some of one token
SWITCHES = ("use_convs", "use_qk_mean", "use_qk_norm", "use_value_shift")


def rows(batch=2, length=9, width=12):
    return torch.randn(batch, length, width, dtype=torch.float64, requires_grad=True)


def compare(layer, documents, relative_error, batch=2):
    """Largest relative error of the output and of any gradient."""
    x = rows(batch)
    starts = DOCUMENTS[:batch] if documents else None
    ours = layer(x, ContextParallel(None).plan(9, starts) if documents else None)
    theirs = ccgqa_reference(layer, x, starts)
    weights = torch.randn(ours.shape, dtype=torch.float64)
    inputs = [x, *layer.parameters()]
    grads = torch.autograd.grad((ours * weights).sum(), inputs, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad((theirs * weights).sum(), inputs, allow_unused=True, materialize_grads=True)
    pairs = [(ours, theirs), *zip(grads, expected, strict=True)]
    # What has no influence has rounding for a gradient, such as the query of a row that sees one key.
    return max(relative_error(a, b) for a, b in pairs if max(a.abs().max(), b.abs().max()) > 1e-12)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kernel_sizes", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 4), (4, 3)])
def test_kernel_sizes(kernel_sizes, documents, randomize, relative_error):
    layer = randomize(CCGQA(12, 2, 1, 4, kernel_sizes))
    assert compare(layer, documents, relative_error) < 1e-12


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (3, 3), (6, 3), (8, 1)])
def test_groups_and_odd_numbers_of_key_heads(heads, documents, randomize, relative_error):
    layer = randomize(CCGQA(12, *heads, 4))
    assert compare(layer, documents, relative_error, batch=1) < 1e-12


@pytest.mark.parametrize("values", list(itertools.product([False, True], repeat=4)))
def test_switches(values, randomize, relative_error):
    layer = randomize(CCGQA(12, 4, 2, 4, **dict(zip(SWITCHES, values, strict=True))))
    assert compare(layer, True, relative_error) < 1e-12


@pytest.mark.parametrize(
    "rows_option", [{"window": 1}, {"window": 3}, {"rope_dim": 0}, {"rope_dim": 4, "rope_theta": 50.0}]
)
def test_window_and_rotation(rows_option, randomize, relative_error):
    layer = randomize(CCGQA(12, 4, 2, 4, **rows_option))
    assert compare(layer, True, relative_error) < 1e-12


def zeros_before_the_sequence(monkeypatch):
    """Wrong: the second convolution is padded with zeros, not with the first one's bias."""
    columns = convolution.columns

    def wrong(u, ages, taps):
        u = u.clone()
        u[: taps.w1.shape[1] // taps.w1.shape[2] - 1] = 0
        return columns(u, ages, taps)

    monkeypatch.setattr(convolution, "columns", wrong)


def zeros_before_documents(monkeypatch):
    """Wrong inside packed rows only: a tap before the document reads 0 instead of the bias."""
    columns = convolution.columns

    def wrong(u, ages, taps):
        return columns(u, ages, replace(taps, b0=torch.zeros_like(taps.b0)))

    monkeypatch.setattr(convolution, "columns", wrong)


def documents_ignored_by_convolutions(monkeypatch):
    monkeypatch.setattr(prologue_plain, "_ages", lambda *_: None)


def mean_of_what_comes_out_of_the_convolutions(monkeypatch):
    add = prologue_plain._add_mean
    monkeypatch.setattr(
        prologue_plain, "_add_mean", lambda q, k, latent, switches: add(q, k, torch.cat([q, k], dim=1), switches)
    )


def mean_over_all_heads(monkeypatch):
    def wrong(q, k, latent, switches):
        latent_q, latent_k = latent.split([switches.num_query_heads, switches.num_key_heads], dim=1)
        everything = 0.5 * (latent_q.mean(1, keepdim=True) + latent_k.mean(1, keepdim=True))
        q += everything
        k += everything

    monkeypatch.setattr(prologue_plain, "_add_mean", wrong)


def no_mean(monkeypatch):
    monkeypatch.setattr(prologue_plain, "_add_mean", lambda *_: None)


def no_temperature(monkeypatch):
    monkeypatch.setattr(Prologue, "beta", lambda self: torch.ones(2, dtype=torch.float64))


def values_without_delay(monkeypatch):
    monkeypatch.setattr(prologue_plain, "shift", lambda values, *_: values.clone())


def values_from_another_document(monkeypatch):
    shift = prologue_plain.shift
    monkeypatch.setattr(
        prologue_plain, "shift", lambda values, before, ages, lengths: shift(values, before, None, lengths)
    )


@pytest.mark.parametrize(
    "spoil, documents",
    [
        (zeros_before_the_sequence, False),
        (zeros_before_documents, True),
        (documents_ignored_by_convolutions, True),
        (mean_of_what_comes_out_of_the_convolutions, False),
        (mean_over_all_heads, False),
        (no_mean, False),
        (no_temperature, False),
        (values_without_delay, False),
        (values_from_another_document, True),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_the_comparison_rejects_wrong_layers(spoil, documents, monkeypatch, randomize, relative_error):
    spoil(monkeypatch)
    assert compare(randomize(CCGQA(12, 4, 2, 4)), documents, relative_error) > 1e-3


@pytest.mark.parametrize("temperature", ["exp", "raw", "exp_clamp"])
def test_temperatures(temperature, randomize, relative_error):
    layer = randomize(CCGQA(12, 4, 2, 4, temperature=temperature))
    with torch.no_grad():
        layer.prologue.tau.copy_(torch.tensor([0.7, -0.3]))
    assert compare(layer, True, relative_error) < 1e-12
    if temperature != "exp":
        layer.prologue.temperature = "exp"
        other = layer.prologue.beta()
        layer.prologue.temperature = temperature
        assert not torch.allclose(layer.prologue.beta(), other)


def test_a_raw_temperature_of_zero_learns(randomize, relative_error):
    layer = randomize(CCGQA(12, 4, 2, 4, temperature="raw"))
    with torch.no_grad():
        layer.prologue.tau.zero_()
    assert compare(layer, False, relative_error) < 1e-12
    layer(rows()).square().mean().backward()
    assert bool((layer.prologue.tau.grad != 0).all())


def test_norm_before_the_up_projection(randomize, relative_error):
    layer = randomize(CCGQA(12, 4, 2, 4, use_output_norm=True))
    assert compare(layer, True, relative_error) < 1e-12
    layer.output_norm = None
    assert "output_norm.weight" not in dict(CCGQA(12, 4, 2, 4).named_parameters())


def test_gradcheck(randomize):
    layer = randomize(CCGQA(6, 2, 1, 2, (2, 2)))
    x = rows(1, 5, 6)
    names = list(dict(layer.named_parameters()))
    seq = ContextParallel(None).plan(5, torch.tensor([[0, 0, 2, 3, 3]]))

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, seq))

    assert torch.autograd.gradcheck(run, [x, *layer.parameters()])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logits_are_bounded_by_temperature_and_head_size(temperature, randomize):
    layer = randomize(CCGQA(12, 2, 1, 8))
    with torch.no_grad():
        layer.prologue.tau.fill_(temperature).log_()
    q, k, _ = layer.queries_keys_values(rows(1, 50) * 30)
    logits = torch.einsum("bqhd,bkd->bhqk", q, k[:, :, 0]) / 8**0.5
    assert 0.5 * temperature * 8**0.5 < logits.abs().max() <= temperature * 8**0.5 * (1 + 1e-12)
    torch.testing.assert_close(q.square().mean(-1), torch.ones(1, 50, 2, dtype=torch.float64))


def test_the_temperature_learns_from_the_start():
    layer = CCGQA(12, 4, 2, 4).double()
    for linear in (layer.down, layer.output):
        torch.nn.init.normal_(linear.weight)
    layer(rows()).square().mean().backward()
    assert bool((layer.prologue.tau == 0).all())
    assert bool((layer.prologue.tau.grad != 0).all())


@pytest.mark.parametrize("mode", ["autocast", "bf16"])
def test_low_precision_is_near_fp64(mode, relative_error):
    from hydra_dist.model import initialize

    layer = CCGQA(64, 4, 2, 16)
    initialize(layer, 0, init_std=0.1)
    x = torch.randn(2, 48, 64)
    exact = ccgqa_reference(layer.double(), x.double())
    layer.float()
    if mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            ours = layer(x)
    else:
        ours = layer.bfloat16()(x.bfloat16())
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours.double(), exact) < 3e-2
    ours.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_a_row_whose_latent_is_zero_stays_finite(randomize):
    layer = randomize(CCGQA(12, 4, 2, 4)).float()
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    x = torch.zeros(1, 4, 12, requires_grad=True)
    layer(x).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"num_query_heads": 5}, "num_query_heads 5 is not a multiple of num_key_heads 2; 4 query heads"),
        ({"head_dim": 7}, "head_dim 7 is not a positive even number; 8 works"),
        ({"conv_kernel_sizes": (2, 0)}, r"conv_kernel_sizes \(2, 0\) is not two positive numbers; \(2, 2\) works"),
    ],
)
def test_what_cannot_work_is_refused(arguments, said):
    with pytest.raises(ConfigError, match=said):
        CCGQA(**{"hidden_size": 12, "num_query_heads": 4, "num_key_heads": 2, "head_dim": 4, **arguments})
