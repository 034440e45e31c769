"""SwiGLU against its formula, and what it keeps."""

import torch
from torch.nn import functional

from hydra_dist.model.mlp import MLP, swiglu


def test_values_and_gradients(relative_error):
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 5, 6, dtype=torch.float64)
    gate, up = x.chunk(2, dim=-1)
    expected = functional.silu(gate) * up
    assert relative_error(swiglu(x), expected) < 1e-15
    (ours,) = torch.autograd.grad((swiglu(x) * weights).sum(), x)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), x)
    assert relative_error(ours, theirs) < 1e-14
    assert torch.autograd.gradcheck(swiglu, x)
    assert relative_error(swiglu(x), gate * functional.silu(up)) > 0.1


def test_the_whole_layer(randomize, relative_error):
    layer = randomize(MLP(4, 16))
    x = torch.randn(3, 4, dtype=torch.float64)
    hidden = x @ layer.gate_up.weight.T
    expected = (functional.silu(hidden[:, :16]) * hidden[:, 16:]) @ layer.down.weight.T
    assert relative_error(layer(x), expected) < 1e-14


def test_only_the_projection_is_kept():
    x = torch.randn(4, 32, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]
