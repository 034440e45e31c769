"""Starting values: what they depend on, how large they are, and which parameters decay."""

import pytest
import torch
from torch import nn

from hydra_dist.model import CCGQA, Transformer, initialize, parameter_groups
from hydra_dist.model.sequence import WholeSequence


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_they_depend_on_seed_and_name_alone(model_config):
    small, deep, again = (Transformer(model_config(num_layers=n)) for n in (2, 3, 2))
    initialize(deep, 0)
    torch.randn(3)
    initialize(small, 0)
    a, b = values(small), values(deep)
    for name in a:
        if not name.endswith(("output.weight", "mlp.down.weight")):  # scaled by depth
            assert torch.equal(a[name], b[name]), name
    initialize(again, 1)
    assert not torch.equal(a["embedding.weight"], values(again)["embedding.weight"])
    assert not torch.equal(a["layers.0.mlp.gate_up.weight"], a["layers.1.mlp.gate_up.weight"])


def test_another_dtype_only_rounds(model_config):
    a, b = Transformer(model_config()), Transformer(model_config()).bfloat16()
    initialize(a, 5)
    initialize(b, 5)
    for name, value in values(a).items():
        assert torch.equal(value.bfloat16(), values(b)[name]), name


def test_sizes(model_config):
    config = model_config(hidden_size=256, num_layers=8, vocab_size=500, tie_embeddings=False)
    model = Transformer(config)
    initialize(model, 0)
    std = {name: float(p.detach().std()) for name, p in model.named_parameters() if p.numel() > 1}
    cut = 0.9866  # of a normal distribution cut at three standard deviations
    for name in ("embedding.weight", "head.weight", "layers.3.attention.down.weight", "layers.3.mlp.gate_up.weight"):
        assert std[name] == pytest.approx(0.02 * cut, rel=0.03)
    for name in ("layers.3.attention.output.weight", "layers.3.mlp.down.weight"):
        assert std[name] == pytest.approx(0.02 * cut / 4, rel=0.05)
        assert std[name] != pytest.approx(0.02 * cut, rel=0.05)
    convs = model.layers[0].attention.prologue
    depthwise = convs.depthwise_weight.detach() - torch.tensor([0.0, 1.0])
    grouped = convs.grouped_weight.detach() - torch.cat([torch.zeros(8, 8), torch.eye(8)])
    assert 0.09 * 2**-0.5 < depthwise.abs().max() <= 0.1 * 2**-0.5 + 1e-6
    assert 0.09 * 16**-0.5 < grouped.abs().max() <= 0.1 * 16**-0.5 + 1e-6
    for name, p in model.named_parameters():
        if name.endswith(("bias", "tau")):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name


@pytest.mark.parametrize("heads", [(1, 1), (4, 2)])
def test_an_induction_layer_attends_to_what_followed_the_same_row(model_config, heads):
    shape = {"hidden_size": 64, "head_dim": 32, "num_query_heads": heads[0], "num_key_heads": heads[1]}
    rows = torch.randn(1, 40, 64)
    rows[0, 39] = rows[0, 12]
    ranks = {}
    for induction in ((), (0,)):
        model = Transformer(model_config(**shape, rope_fraction=0.0, induction_layers=induction))
        initialize(model, 0)
        probe = KeepsScores(40, rows.device)
        model.layers[0].attention(rows, probe)
        ranks[bool(induction)] = sorted(range(39), key=lambda row: -float(probe.last[row]))
    assert set(ranks[True][:2]) == {12, 13}, "the earlier occurrence and the row after it"
    assert 13 not in ranks[False][:2]


class KeepsScores(WholeSequence):
    """Keeps the last row's scores over all rows, the lowest of its heads."""

    def attention(self, q, k, v, causal=True, window=None, logit_bound=None):
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        self.last = torch.einsum("hd,shd->sh", q[0, -1], k[0]).detach().amin(1)
        return super().attention(q, k[:, :, :: q.shape[2] // v.shape[2]], v, causal, window)


def test_convolutions_start_near_the_identity():
    layer = CCGQA(16, 2, 1, 8, (3, 4), use_qk_mean=False, use_qk_norm=False, use_value_shift=False)
    initialize(layer, 0, init_std=0.1)
    z = torch.randn(1, 30, 32)  # 24 channels of queries and keys, 8 of values
    with torch.no_grad():
        q, k, v = layer.prologue(z, None, None, None, (30,), None)
    y = torch.cat([q, k], dim=2).flatten(2)
    assert (y - z[..., :24]).square().mean() < 0.05
    assert (y[:, 1:] - z[:, :-1, :24]).square().mean() > 1.0  # the row before
    assert torch.equal(v.flatten(2), z[..., 24:])


@pytest.mark.parametrize("temperature", ["exp", "raw", "exp_clamp"])
def test_temperatures_start_near_one_and_with_a_gradient(temperature):
    layer = CCGQA(16, 4, 2, 8, temperature=temperature)
    initialize(layer, 0, init_std=0.1)
    beta = layer.prologue.beta()
    assert (beta - 1).abs().max() < 0.011
    beta.sum().backward()
    assert layer.prologue.tau.grad.abs().min() > 0.9
    if temperature == "exp_clamp":
        layer.prologue.tau.data.zero_()  # where the others start: below the clamp's lower edge
        (gradient,) = torch.autograd.grad(layer.prologue.beta().sum(), layer.prologue.tau)
        assert not gradient.any()


def test_one_layer_and_unknown_modules():
    layer = CCGQA(16, 2, 1, 8)
    initialize(layer, 0, init_std=0.1)
    assert layer.down.weight.detach().std() == pytest.approx(0.1, rel=0.2)
    with pytest.raises(ValueError, match="init_std is needed for a CCGQA"):
        initialize(layer, 0)
    with pytest.raises(ValueError, match="no starting values for weight of Conv1d"):
        initialize(nn.Sequential(nn.Conv1d(2, 2, 1)), 0, init_std=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_decay_acts_on_matrices(tied, model_config):
    model = Transformer(model_config(tie_embeddings=tied, use_output_norm=True))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    decayed_names, kept_names = ({names[id(p)] for p in group["params"]} for group in (decayed, kept))
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    assert decayed_names | kept_names == set(names.values())
    suffixes = ("down.weight", "output.weight", "gate_up.weight", "grouped_weight")
    assert decayed_names == {n for n in names.values() if n.endswith(suffixes) or n == "head.weight"}
    assert "embedding.weight" in kept_names
