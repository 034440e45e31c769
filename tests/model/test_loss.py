"""The chunked loss against torch's cross entropy, its edges, and what it never allocates."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hydra_dist.model.loss import NO_TARGET, Head, chunked_cross_entropy, chunked_token_nll

B, S, E, V = 2, 13, 8, 31


@pytest.fixture
def inputs():
    x = torch.randn(B, S, E, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, E, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, V, (B, S))
    targets[0, ::3] = NO_TARGET
    return x, weight, targets


def plain(x, weight, targets, reduction="sum"):
    logits = (x @ weight.T).flatten(0, 1)
    return functional.cross_entropy(logits, targets.flatten(), ignore_index=NO_TARGET, reduction=reduction)


@pytest.mark.parametrize("chunk_size", [1, 5, 13, 26, 1000])
def test_value_and_gradients(inputs, chunk_size, relative_error):
    x, weight, targets = inputs
    ours, theirs = chunked_cross_entropy(x, weight, targets, chunk_size), plain(x, weight, targets)
    assert relative_error(ours, theirs) < 1e-14
    grads = torch.autograd.grad(ours * 0.3, (x, weight))
    for a, b in zip(grads, torch.autograd.grad(theirs * 0.3, (x, weight)), strict=True):
        assert relative_error(a, b) < 1e-13
    nll = chunked_token_nll(x, weight, targets, chunk_size)
    assert nll.shape == (B, S)
    assert not nll.requires_grad
    assert relative_error(nll.flatten(), plain(x, weight, targets, "none")) < 1e-13


def test_gradcheck(inputs):
    x, weight, targets = inputs
    assert torch.autograd.gradcheck(lambda x, weight: chunked_cross_entropy(x, weight, targets, 5), (x, weight))


def test_the_check_above_rejects_a_mean_and_a_counted_absent_target(inputs, relative_error):
    x, weight, targets = inputs
    ours = chunked_cross_entropy(x, weight, targets, 5)
    assert relative_error(ours, plain(x, weight, targets, "mean")) > 0.1
    assert relative_error(ours, plain(x, weight, targets.clamp(min=0))) > 1e-3


def test_no_target_at_all(inputs):
    x, weight, targets = inputs
    loss = chunked_cross_entropy(x, weight, torch.full_like(targets, NO_TARGET), 5)
    grads = torch.autograd.grad(loss, (x, weight))
    assert loss == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_a_target_beyond_the_vocabulary_is_an_error(inputs):
    x, weight, targets = inputs
    for wrong in (V, -5):
        targets[1, 1] = wrong
        with pytest.raises((RuntimeError, IndexError)):
            chunked_cross_entropy(x, weight, targets, 5)


@pytest.mark.parametrize("wants", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_wanted(inputs, wants, relative_error):
    x, weight, targets = inputs
    x, weight = x.detach().requires_grad_(wants[0]), weight.detach().requires_grad_(wants[1])
    loss = chunked_cross_entropy(x, weight, targets, 5)
    assert loss.requires_grad == any(wants)
    if any(wants):
        wanted = [tensor for tensor, want in zip((x, weight), wants, strict=True) if want]
        (ours,) = torch.autograd.grad(loss, wanted)
        (theirs,) = torch.autograd.grad(plain(x, weight, targets), wanted)
        assert relative_error(ours, theirs) < 1e-13


def test_huge_logits_stay_finite():
    x = torch.full((1, 2, 4), 1e3, requires_grad=True)
    weight = torch.randn(9, 4) * 100
    loss = chunked_cross_entropy(x, weight, torch.tensor([[0, 8]]), 1)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("mode", ["autocast", "bf16"])
def test_low_precision_loses_no_more_than_the_plain_loss(inputs, mode):
    x, weight, targets = (tensor.detach() for tensor in inputs)
    x, weight = x.float().requires_grad_(), weight.float().requires_grad_()
    exact = torch.autograd.grad(plain(x.double(), weight.double(), targets), (x, weight))
    if mode == "bf16":
        x, weight = (tensor.detach().bfloat16().requires_grad_() for tensor in (x, weight))
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        ours = chunked_cross_entropy(x, weight, targets, 5)
        theirs = functional.cross_entropy(
            functional.linear(x, weight).flatten(0, 1).float(),
            targets.flatten(),
            ignore_index=NO_TARGET,
            reduction="sum",
        )
    assert ours.dtype == torch.float32
    grads = torch.autograd.grad(ours, (x, weight))
    for a, b, c in zip(grads, torch.autograd.grad(theirs, (x, weight)), exact, strict=True):
        assert a.dtype == b.dtype
        error, plain_error = ((g.double() - c.double()).square().mean().sqrt() for g in (a, b))
        assert error <= 1.25 * plain_error


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operator returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_of_the_sequence_never_exist(dtype):
    x = torch.randn(1, 512, 4, dtype=dtype, requires_grad=True)
    weight = torch.randn(1000, 4, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 1000, (1, 512))
    with Largest() as ours:
        chunked_cross_entropy(x, weight, targets, 32).backward()
    assert ours.numel == 32 * 1000
    with Largest() as plainly:
        plain(x, weight, targets).backward()
    assert plainly.numel == 512 * 1000
    with Largest() as evaluation:
        chunked_token_nll(x, weight, targets, 32)
    assert evaluation.numel == 32 * 1000


def test_what_the_head_gives(inputs):
    x, weight, targets = inputs
    head = Head(V, E, 7)
    head.weight = torch.nn.Parameter(weight.detach())
    assert torch.equal(head(x), functional.linear(x, weight))
    assert torch.equal(head(x, targets), chunked_cross_entropy(x, weight, targets, 7))
    assert torch.equal(head(x, targets, "none"), chunked_token_nll(x, weight, targets, 7))
    with pytest.raises(ValueError, match="neither"):
        head(x, targets, "mean")


@pytest.mark.parametrize("change", ["targets", "weight", "chunk"])
def test_what_does_not_fit_is_refused(inputs, change):
    x, weight, targets = inputs
    with pytest.raises(ValueError, match=r"expected|positive"):
        chunked_cross_entropy(
            x,
            weight[:, :-1] if change == "weight" else weight,
            targets[:1] if change == "targets" else targets,
            0 if change == "chunk" else 4,
        )
