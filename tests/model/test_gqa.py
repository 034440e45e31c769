"""Grouped-query attention against plain attention with repeated heads."""

import pytest
import torch
from torch.nn import functional

from hydra_dist.context import ContextParallel
from hydra_dist.errors import ConfigError
from hydra_dist.model import GQA
from hydra_dist.model.rope import rope_tables, rotate


def plain(layer, x, starts=None):
    """Repeated key heads, a mask, torch's attention."""
    B, S, _ = x.shape
    Hq, Hk, D = layer.num_query_heads, layer.num_key_heads, layer.head_dim
    q, k, v = (x @ layer.qkv.weight.T).split([Hq * D, Hk * D, Hk * D], dim=-1)
    rope = rope_tables(torch.arange(S), layer.rope_dim, layer.rope_theta, x.dtype)
    q, k, v = (part.view(B, S, -1, D) for part in (q, k, v))
    q, k = rotate(q, rope), rotate(k, rope)
    k, v = (part.repeat_interleave(Hq // Hk, dim=2) for part in (k, v))
    distance = torch.arange(S).unsqueeze(1) - torch.arange(S)
    mask = (distance >= 0) & (distance < (layer.window or S))
    if starts is not None:
        mask = mask & (starts.unsqueeze(2) == starts.unsqueeze(1))
        mask = mask.unsqueeze(1)
    out = functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    )
    return out.transpose(1, 2).flatten(2) @ layer.output.weight.T


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"rope_dim": 0}, {"rope_dim": 8, "rope_theta": 30.0}], ids=str)
def test_values_and_gradients(heads, options, documents, randomize, relative_error):
    layer = randomize(GQA(12, *heads, 8, **options))
    x = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    starts = torch.tensor([[0, 1, 2, 2, 2, 5, 5, 5, 5], [0, 0, 0, 3, 4, 4, 6, 6, 8]]) if documents else None
    ours = layer(x, ContextParallel(None).plan(9, starts) if documents else None)
    theirs = plain(layer, x, starts)
    assert relative_error(ours, theirs) < 1e-12
    weights = torch.randn(ours.shape, dtype=torch.float64)
    inputs = [x, *layer.parameters()]
    grads = torch.autograd.grad((ours * weights).sum(), inputs)
    for a, b in zip(grads, torch.autograd.grad((theirs * weights).sum(), inputs), strict=True):
        assert relative_error(a, b) < 1e-12


def test_the_check_above_rejects_heads_grouped_the_other_way(randomize, relative_error):
    """Query head h reading key head h modulo Hk."""
    layer = randomize(GQA(12, 4, 2, 8))
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    expected = plain(layer, x)
    q = layer.qkv.weight[:32].view(2, 2, 8, 12).transpose(0, 1).reshape(32, 12)
    o = layer.output.weight.view(12, 2, 2, 8).transpose(1, 2).reshape(12, 32)
    with torch.no_grad():
        layer.qkv.weight[:32] = q
        layer.output.weight.copy_(o)
    assert relative_error(layer(x), expected) > 1e-2


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigError, match="num_query_heads 5 is not a multiple of num_key_heads 2"):
        GQA(12, 5, 2, 8)
