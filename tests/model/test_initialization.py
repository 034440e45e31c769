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
    convs = model.layers[0].attention.convs
    depthwise = convs.depthwise_weight.detach() - torch.tensor([0.0, 1.0])
    grouped = convs.grouped_weight.detach() - torch.cat([torch.zeros(8, 8), torch.eye(8)])
    assert 0.09 * 2**-0.5 < depthwise.abs().max() <= 0.1 * 2**-0.5 + 1e-6
    assert 0.09 * 16**-0.5 < grouped.abs().max() <= 0.1 * 16**-0.5 + 1e-6
    for name, p in model.named_parameters():
        if name.endswith(("bias", "tau")):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name


def test_a_recency_bias_makes_near_rows_count_more(model_config):
    """Attention of the first layer at its start: with the bias the weights fall with distance, without they do not."""
    heads = {"hidden_size": 64, "head_dim": 32, "num_query_heads": 1, "num_key_heads": 1}
    scores = {}
    for bias in (0.0, 2.0):
        model = Transformer(model_config(**heads, recency_bias=bias))
        initialize(model, 0)
        probe = KeepsScores(513, torch.device("cpu"))
        model.layers[0].attention(torch.randn(1, 513, 64), probe)
        scores[bias] = [float(probe.last[a:b].mean()) for a, b in ((1, 4), (4, 16), (16, 64), (64, 256), (256, 512))]
    assert scores[2.0] == sorted(scores[2.0], reverse=True)
    assert scores[2.0][0] - scores[2.0][-1] > 1.0
    assert scores[0.0] != sorted(scores[0.0], reverse=True)


class KeepsScores(WholeSequence):
    """Keeps the scores of the last row, nearest first."""

    def attention(self, q, k, v, causal=True, window=None):
        self.last = ((q[0, -1, 0] @ k[0, :, 0].t()) / q.shape[-1] ** 0.5).detach().flip(0)
        return super().attention(q, k, v, causal, window)


def test_convolutions_start_near_the_identity():
    layer = CCGQA(16, 2, 1, 8, (3, 4))
    initialize(layer, 0, init_std=0.1)
    z = torch.randn(1, 30, 24)
    with torch.no_grad():
        y = layer.convs(z).flatten(2)
        assert (y - z[:, 5:]).square().mean() < 0.05
        assert (y - z[:, 4:-1]).square().mean() > 1.0  # the row before


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
    model = Transformer(model_config(tie_embeddings=tied))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    decayed_names, kept_names = ({names[id(p)] for p in group["params"]} for group in (decayed, kept))
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    assert decayed_names | kept_names == set(names.values())
    suffixes = ("down.weight", "output.weight", "gate_up.weight", "grouped_weight")
    assert decayed_names == {n for n in names.values() if n.endswith(suffixes) or n == "head.weight"}
    assert "embedding.weight" in kept_names
