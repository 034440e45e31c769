"""The reference against autograd through PyTorch's own softmax, and at rows without keys."""

import pytest
import torch

from hydra_dist.attention import Mask, reference

LENGTH = 97


def by_autograd(q, k, v, grad_out, allowed, scale):
    """The same through torch.softmax and autograd; every query must see a key."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    scores = torch.einsum("bqhgd,bkhd->bhgqk", q.unflatten(2, (-1, groups)), k) * scale
    scores = scores.masked_fill(~allowed[:, None, None], -torch.inf)
    out = torch.einsum("bhgqk,bkhd->bqhgd", scores.softmax(-1), v).flatten(2, 3)
    return out, scores.logsumexp(-1).flatten(1, 2), *torch.autograd.grad(out, (q, k, v), grad_out)


def by_reference(q, k, v, grad_out, allowed, scale):
    out, lse = reference.forward(q, k, v, allowed, scale)
    return out, lse, *reference.backward(grad_out, q, k, v, out, lse, allowed, scale)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (8, 1), (6, 3)])
def test_against_autograd(inputs, difference, mask, heads):
    tensors = inputs(q_length=LENGTH, heads=heads, head_dim=8)
    allowed = mask.allowed(LENGTH, LENGTH)
    for ours, theirs in zip(by_reference(*tensors, allowed, 0.3), by_autograd(*tensors, allowed, 0.3), strict=True):
        assert difference(ours, theirs) < 1e-13


def test_the_check_above_rejects_wrong_gradients(inputs, difference):
    q, k, v, grad_out = inputs()
    allowed = Mask().allowed(33, 33)
    expected = by_autograd(q, k, v, grad_out, allowed, 0.3)
    out, lse = reference.forward(q, k, v, allowed, 0.3)
    no_delta = reference.backward(grad_out, q, k, v, torch.zeros_like(out), lse, allowed, 0.3)
    assert difference(no_delta[0], expected[2]) > 1e-2
    shifted = Mask(window=32).allowed(33, 33)
    assert difference(reference.forward(q, k, v, shifted, 0.3)[0], expected[0]) > 1e-4


def test_gradcheck():
    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, allowed):
            out, lse = reference.forward(q, k, v, allowed, 0.5)
            ctx.save_for_backward(q, k, v, out, lse, allowed)
            return out

        @staticmethod
        def backward(ctx, grad_out):
            q, k, v, out, lse, allowed = ctx.saved_tensors
            return *reference.backward(grad_out, q, k, v, out, lse, allowed, 0.5), None

    q = torch.randn(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    allowed = torch.ones(2, 5, 4, dtype=torch.bool)
    allowed[0, 2] = False
    allowed[1, :, 1:3] = False
    assert torch.autograd.gradcheck(Attend.apply, (q, k, v, allowed))


def test_rows_without_keys_are_zero_and_finite(inputs):
    q, k, v, grad_out = inputs()
    allowed = Mask().allowed(33, 33).clone()
    allowed[:, 7] = False
    out, lse = reference.forward(q, k, v, allowed, 0.3)
    assert torch.equal(out[:, 7], torch.zeros_like(out[:, 7]))
    assert bool((lse[:, :, 7] == -torch.inf).all())
    grads = reference.backward(grad_out, q, k, v, out, lse, allowed, 0.3)
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)
    assert torch.equal(grads[0][:, 7], torch.zeros_like(out[:, 7]))
    changed = grad_out.clone()
    changed[:, 7] += 100.0
    again = reference.backward(changed, q, k, v, out, lse, allowed, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


def test_no_keys_at_all(inputs):
    q, k, v, grad_out = inputs(k_length=0)
    out, lse = reference.forward(q, k, v, None, 0.3)
    assert torch.equal(out, torch.zeros_like(q))
    assert bool((lse == -torch.inf).all())
    grad_q, grad_k, _ = reference.backward(grad_out, q, k, v, out, lse, None, 0.3)
    assert torch.equal(grad_q, torch.zeros_like(q))
    assert grad_k.shape == k.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_fp32(inputs, difference, dtype):
    tensors = [x.to(dtype) for x in inputs()]
    allowed = Mask().allowed(33, 33)
    results = by_reference(*tensors, allowed, 0.3)
    expected = by_reference(*(x.double() for x in tensors), allowed, 0.3)
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.dtype == torch.float32
        assert difference(ours, theirs) < 1e-6
