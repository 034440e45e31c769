"""RMS normalisation against its formula in autograd, and what it keeps and computes in low precision."""

import pytest
import torch

from hydra_dist.model.norm import RMSNorm, rms_normalize


def plain(x, scale, eps):
    y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if scale is None else y * scale


@pytest.mark.parametrize("scale_shape", [None, (6,), (3, 1), (3, 6)])
def test_values_and_gradients(scale_shape, relative_error):
    x = torch.randn(2, 5, 3, 6, dtype=torch.float64, requires_grad=True)
    scale = None if scale_shape is None else torch.randn(scale_shape, dtype=torch.float64, requires_grad=True)
    inputs = [tensor for tensor in (x, scale) if tensor is not None]
    weights = torch.randn(x.shape, dtype=torch.float64)
    ours, theirs = rms_normalize(x, scale, 1e-3), plain(x, scale, 1e-3)
    assert relative_error(ours, theirs) < 1e-14
    grads = torch.autograd.grad((ours * weights).sum(), inputs)
    for a, b in zip(grads, torch.autograd.grad((theirs * weights).sum(), inputs), strict=True):
        assert relative_error(a, b) < 1e-13
    assert torch.autograd.gradcheck(
        lambda *args: rms_normalize(*args, None, 1e-3) if scale is None else rms_normalize(*args, 1e-3), inputs
    )


def test_the_check_above_rejects_an_eps_outside_the_root(relative_error):
    x = torch.randn(4, 6, dtype=torch.float64)
    wrong = x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-3)
    assert relative_error(wrong, plain(x, None, 1e-3)) > 1e-6


def test_low_precision_is_computed_in_fp32():
    x = (100 + torch.randn(64, 512)).bfloat16()
    exact = plain(x.double(), None, 1e-6)
    ours = rms_normalize(x, None, 1e-6, torch.float32)
    in_bf16 = x / x.square().mean(-1, keepdim=True).sqrt()
    assert (ours - exact).abs().max() < 1e-6
    assert (in_bf16 - exact).abs().max() > 1e-3


def test_a_zero_row_is_zero_and_finite():
    x = torch.zeros(3, 8, requires_grad=True)
    y = rms_normalize(x, None, 1e-12)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.isfinite(x.grad).all()


def test_under_autocast_the_norm_writes_what_the_next_product_reads():
    norm = RMSNorm(8)
    x = torch.randn(2, 8)
    assert norm(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
        assert norm.double()(x.double()).dtype == torch.float64
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_a_second_derivative_is_refused():
    x, weights = torch.randn(2, 2, 8, requires_grad=True).unbind()
    (grad,) = torch.autograd.grad((rms_normalize(x, None, 1e-6) * weights).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
