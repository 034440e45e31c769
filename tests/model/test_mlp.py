"""SwiGLU against its formula, what it keeps, and the same network tile by tile."""

import pytest
import torch
from torch.nn import functional

from benchmarks.tensor_memory import TensorMemory
from hydra_dist.model import tiled_mlp
from hydra_dist.model.mlp import MLP
from hydra_dist.model.swiglu import swiglu

WIDTH, MLP_SIZE = 6, 10


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


def pair(randomize, tile_size, width=WIDTH, mlp_size=MLP_SIZE):
    """The network tiled and whole, with the same weights and names."""
    tiled, whole = randomize(MLP(width, mlp_size, tile_size)), randomize(MLP(width, mlp_size))
    tiled.load_state_dict(whole.state_dict())
    return tiled, whole


def output_and_gradients(layer, x, autocast=False):
    """Of a sum with weights that differ from row to row."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(x)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape).sin()
    out.backward(weights)
    return out.detach(), x.grad, layer.gate_up.weight.grad, layer.down.weight.grad


@pytest.mark.parametrize("shape", [(2, 23), (1, 1), (46,)], ids=str)
@pytest.mark.parametrize("tile_size", [1, 5, 23, 46, 1000])
def test_tiles_give_the_numbers_of_the_whole(shape, tile_size, randomize, relative_error):
    tiled, whole = pair(randomize, tile_size)
    x = torch.randn(*shape, WIDTH, dtype=torch.float64)
    for a, b in zip(output_and_gradients(tiled, x), output_and_gradients(whole, x), strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("of", ["transposed", "every other row", "strided columns"])
def test_rows_that_do_not_lie_one_after_another(of, randomize, relative_error):
    tiled, whole = pair(randomize, 4)
    x = {
        "transposed": torch.randn(7, 3, WIDTH, dtype=torch.float64).transpose(0, 1),
        "every other row": torch.randn(2, 14, WIDTH, dtype=torch.float64)[:, ::2],
        "strided columns": torch.randn(3, WIDTH, 7, dtype=torch.float64).transpose(1, 2),
    }[of]
    assert not x.is_contiguous()
    for a, b in zip(output_and_gradients(tiled, x), output_and_gradients(whole, x), strict=True):
        assert relative_error(a, b) < 1e-12


def test_a_last_tile_left_out_is_seen(randomize, relative_error, monkeypatch):
    monkeypatch.setattr(
        tiled_mlp, "_tiles", lambda rows, size: (slice(i, i + size) for i in range(0, rows - size, size))
    )
    tiled, whole = pair(randomize, 5)
    x = torch.randn(2, 23, WIDTH, dtype=torch.float64)
    gradients = zip(output_and_gradients(tiled, x)[2:], output_and_gradients(whole, x)[2:], strict=True)
    assert all(relative_error(a, b) > 1e-3 for a, b in gradients)


def test_tiles_and_finite_differences(randomize):
    layer = randomize(MLP(3, 4, 2))
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = [w.detach().requires_grad_() for w in (layer.gate_up.weight, layer.down.weight)]
    assert torch.autograd.gradcheck(lambda *inputs: tiled_mlp.tiled_mlp(*inputs, 2), (x, *weights))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_gradients_that_nobody_asks_for_are_left_out(frozen, randomize, relative_error):
    layer = randomize(MLP(WIDTH, MLP_SIZE))
    inputs = [torch.randn(9, WIDTH, dtype=torch.float64), layer.gate_up.weight.detach(), layer.down.weight.detach()]
    wanted = [tensor.requires_grad_(i not in frozen) for i, tensor in enumerate(inputs)]
    found = tiled_mlp.tiled_mlp(*wanted, 4)
    expected = functional.linear(swiglu(functional.linear(inputs[0], inputs[1])), inputs[2])
    asked = [tensor for tensor in wanted if tensor.requires_grad]
    pairs = zip(*(torch.autograd.grad(out.square().sum(), asked) for out in (found, expected)), strict=True)
    assert all(relative_error(a, b) < 1e-12 for a, b in pairs)


@pytest.mark.parametrize("mode", ["autocast", "bf16"])
def test_weight_gradients_add_up_in_fp32(mode, randomize, relative_error, monkeypatch):
    """One row in 512 tiles: a sum of bf16 numbers would stop growing."""
    tiled, whole = pair(randomize, 1)
    x = torch.randn(1, 1, WIDTH, dtype=torch.float64).expand(1, 512, WIDTH)
    whole(x).sum().backward()
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    tiled.to(dtype)
    errors = []
    for sum_dtype in (torch.float32, torch.bfloat16):  # ours, and a narrow one
        if sum_dtype == torch.bfloat16:
            monkeypatch.setattr(tiled_mlp, "_sum_dtype", lambda dtype: torch.bfloat16)
        tiled.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            out = tiled(x.to(dtype))
        assert out.dtype == torch.bfloat16
        out.backward(torch.ones_like(out))
        assert tiled.gate_up.weight.grad.dtype == dtype
        errors.append(relative_error(tiled.gate_up.weight.grad.double(), whole.gate_up.weight.grad))
    assert errors[0] < 3e-2 < errors[1]


def test_no_second_derivative(randomize):
    layer = randomize(MLP(WIDTH, MLP_SIZE, 4))
    x = torch.randn(9, WIDTH, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_what_does_not_fit_is_refused():
    x, gate_up, down = torch.randn(5, WIDTH), torch.randn(2 * MLP_SIZE, WIDTH), torch.randn(WIDTH, MLP_SIZE)
    with pytest.raises(ValueError, match=r"expected \[..., E\], \[2F, E\], \[E, F\]"):
        tiled_mlp.tiled_mlp(x, gate_up[:-1], down, 4)
    with pytest.raises(ValueError, match="tile_size 0 is not positive"):
        tiled_mlp.tiled_mlp(x, gate_up, down, 0)


def test_nothing_as_large_as_rows_times_the_width_of_the_network(randomize):
    rows, width, mlp_size, tile_size = 512, 8, 32, 16
    largest, kept = {}, {}
    for name, layer in zip(("tiled", "whole"), pair(randomize, tile_size, width, mlp_size), strict=True):
        x = torch.randn(rows, width, dtype=torch.float64, requires_grad=True)
        with TensorMemory() as memory:
            out = layer(x)
            kept[name] = memory.alive_bytes
            out.sum().backward()
        largest[name] = memory.largest_elements
        del out
    assert largest["tiled"] == rows * width, "the result and the gradient of x, and nothing larger"
    assert kept["tiled"] < 8 * rows * width * 1.1, "the result and a token"
    assert largest["whole"] == rows * 2 * mlp_size
    assert kept["whole"] > 8 * rows * 2 * mlp_size
