"""CCGQA against the same layer written row by row, with every switch, and wrong layers that the comparison rejects."""

import itertools

import pytest
import torch
from torch.nn import functional

import hydra_dist.model.ccgqa as module
from hydra_dist.context import ContextParallel
from hydra_dist.errors import ConfigError
from hydra_dist.model import CCGQA, GQA, ccgqa_reference
from hydra_dist.model.convolution import CausalConvolutions

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


class ZeroBeforeTheSequence(CausalConvolutions):
    """Wrong: the second convolution is padded with zeros, not with the first one's bias."""

    def _grouped(self, u, bias, ages):
        u = u.clone()
        u[:, : self.kernel_sizes[1] - 1] = 0
        return super()._grouped(u, bias, ages)


class EachConvolutionPadded(CausalConvolutions):
    """Wrong: every convolution gets its own zeros in front."""

    def forward(self, z, ages=None):
        (k0, k1), z = self.kernel_sizes, z[:, self.num_rows_before :]
        u = self._depthwise(functional.pad(z, (0, 0, k0 - 1, 0)), None)
        return self._grouped(functional.pad(u, (0, 0, k1 - 1, 0)), self.depthwise_bias, None)


class ZeroAtDocuments(CausalConvolutions):
    """Wrong inside packed rows only: a tap before the document reads 0 instead of the bias."""

    def forward(self, z, ages=None):
        return self._grouped(self._depthwise(z, ages), torch.zeros_like(self.depthwise_bias), ages)


class DocumentsIgnored(CausalConvolutions):
    def forward(self, z, ages=None):
        return super().forward(z, None)


class LatentFromConvolution(CCGQA):
    """Wrong: the mean of what comes out of the convolutions."""

    def _add_mean(self, q, k, latent):
        return super()._add_mean(q, k, torch.cat([q, k], dim=2))


class MeanOverAllHeads(CCGQA):
    """Wrong: every head gets the average over all heads, not over its group."""

    def _add_mean(self, q, k, latent):
        latent_q, latent_k = latent.split([self.num_query_heads, self.num_key_heads], dim=2)
        everything = 0.5 * (latent_q.mean(2, keepdim=True) + latent_k.mean(2, keepdim=True))
        return q + everything, k + everything


class NormBeforeMean(CCGQA):
    def _add_mean(self, q, k, latent):
        return super()._add_mean(*self.qk_norm(q, k), latent)


class NoTemperature(CCGQA):
    def _queries_and_keys(self, *args):
        q, k = super()._queries_and_keys(*args)
        return q, k / self.qk_norm.tau.exp().unsqueeze(-1)


def with_convolutions(kind):
    def build(randomize):
        layer = CCGQA(12, 4, 2, 4)
        layer.convs = kind(6, 4, (2, 2))
        return randomize(layer)

    return build


def with_layer(kind):
    return lambda randomize: randomize(kind(12, 4, 2, 4))


@pytest.mark.parametrize(
    "build, documents",
    [
        (with_convolutions(ZeroBeforeTheSequence), False),
        (with_convolutions(EachConvolutionPadded), False),
        (with_convolutions(ZeroAtDocuments), True),
        (with_convolutions(DocumentsIgnored), True),
        (with_layer(LatentFromConvolution), False),
        (with_layer(MeanOverAllHeads), False),
        (with_layer(NormBeforeMean), False),
        (with_layer(NoTemperature), False),
    ],
)
def test_the_comparison_rejects_wrong_layers(build, documents, randomize, relative_error):
    assert compare(build(randomize), documents, relative_error) > 1e-3


def test_the_comparison_rejects_values_without_delay(monkeypatch, randomize, relative_error):
    monkeypatch.setattr(module, "_delay_by_one", lambda rows, *_: rows)
    assert compare(randomize(CCGQA(12, 4, 2, 4)), False, relative_error) > 1e-3


def test_the_comparison_rejects_values_from_another_document(monkeypatch, randomize, relative_error):
    delay = module._delay_by_one
    monkeypatch.setattr(module, "_delay_by_one", lambda rows, before, ages, seq: delay(rows, before, None, seq))
    assert compare(randomize(CCGQA(12, 4, 2, 4)), True, relative_error) > 1e-3


def test_a_rotation_changes_no_length_so_norm_and_rotation_commute(randomize, relative_error):
    layer = randomize(CCGQA(12, 4, 2, 4))
    q, k = (torch.randn(1, 5, heads, 4, dtype=torch.float64) for heads in (4, 2))
    rope = module.rope_tables(torch.arange(5), 4, 10.0, torch.float64)
    norm_first = [module.rotate(x, rope) for x in layer.qk_norm(q, k)]
    norm_last = layer.qk_norm(module.rotate(q, rope), module.rotate(k, rope))
    for a, b in zip(norm_first, norm_last, strict=True):
        assert relative_error(a, b) < 1e-14


def test_gradcheck(randomize):
    layer = randomize(CCGQA(6, 2, 1, 2, (2, 2)))
    x = rows(1, 5, 6)
    names = list(dict(layer.named_parameters()))
    seq = ContextParallel(None).plan(5, torch.tensor([[0, 0, 2, 3, 3]]))

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, seq))

    assert torch.autograd.gradcheck(run, [x, *layer.parameters()])


@pytest.mark.parametrize("fill, bound", [("zeros", 1.0), ("tau", 2.0)])
def test_logits_are_bounded_by_temperature_and_head_size(fill, bound, randomize):
    layer = randomize(CCGQA(12, 2, 1, 8))
    with torch.no_grad():
        layer.qk_norm.tau.fill_(0.0 if fill == "zeros" else torch.tensor(2.0).log())
    q, k = layer.qk_norm(torch.randn(1, 50, 2, 8).double() * 30, torch.randn(1, 50, 1, 8).double() * 0.1)
    logits = torch.einsum("bqhd,bkd->bhqk", q, k[:, :, 0]) / 8**0.5
    assert logits.abs().max() <= bound * 8**0.5 * (1 + 1e-12)
    torch.testing.assert_close(q.square().mean(-1), torch.ones(1, 50, 2, dtype=torch.float64))


def test_the_temperature_learns_from_the_start():
    layer = CCGQA(12, 4, 2, 4).double()
    for linear in (layer.down, layer.output):
        torch.nn.init.normal_(linear.weight)
    layer(rows()).square().mean().backward()
    assert bool((layer.qk_norm.tau == 0).all())
    assert bool((layer.qk_norm.tau.grad != 0).all())


def test_gradients_are_of_the_size_of_plain_attention():
    """Under a mean loss, and with starting values, nothing in the layer makes gradients larger than GQA's are."""
    from hydra_dist.model import initialize

    norms = {}
    for name, layer in (("ccgqa", CCGQA(64, 4, 2, 16)), ("gqa", GQA(64, 4, 2, 16))):
        initialize(layer, 0, init_std=0.02)
        generator = torch.Generator().manual_seed(0)
        x, target = torch.randn(2, 2, 64, 64, generator=generator).unbind()
        (layer(x) - target).square().mean().backward()
        norms[name] = torch.stack([p.grad.norm() for p in layer.parameters()]).norm()
    assert norms["ccgqa"] < 10 * norms["gqa"]
    assert norms["ccgqa"] < 1.0


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
