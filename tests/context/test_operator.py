"""Attention over ranks as an operator: checkpointing, compilation, second derivatives, and the lifetime of plans."""

import functools
import weakref

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hydra_dist.context import SAVED_BY_CHECKPOINT, ContextParallel, run_ranks
from hydra_dist.context.handles import HANDLES, Handles


def layers(seq, x, depth=2):
    """A few attentions on top of each other, each with pointwise work that is worth recomputing."""
    for _ in range(depth):
        x = x + torch.sin(seq.attention(torch.cos(x), torch.tanh(x), x))
    return x


def run(mesh, policy, x):
    """Gradient of the local rows, and the messages of the key rotation, after forward and after backward."""
    seq = ContextParallel(mesh).plan(x.shape[1])
    leaf = seq.shard(x, 1).requires_grad_()
    if policy == "none":
        out = layers(seq, leaf)
    else:
        settings = {}
        if policy == "selective":

            def keep(ctx, op, *args, **kwargs):
                return CheckpointPolicy.MUST_SAVE if op in SAVED_BY_CHECKPOINT else CheckpointPolicy.PREFER_RECOMPUTE

            settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep)
        out = checkpoint(layers, seq, leaf, use_reentrant=False, **settings)
    before = seq.stats()["forward"]["kinds"]["keys"]["messages"]
    out.square().sum().backward()
    return leaf.grad, before, seq.stats()["forward"]["kinds"]["keys"]["messages"]


@pytest.fixture
def x():
    return torch.randn(1, 32, 2, 4, dtype=torch.float64)


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_checkpointing_changes_nothing_but_the_messages(x, policy):
    plain = run_ranks(4, lambda mesh: run(mesh, "none", x))
    saved = run_ranks(4, lambda mesh: run(mesh, policy, x))
    for (grad, before, after), (wanted, *_) in zip(saved, plain, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-13)
        assert before == 2 * 3
        # Selective checkpointing keeps out and lse, so the recomputation sends no keys; full checkpointing does.
        assert after == (before if policy == "selective" else 2 * before)


def test_a_second_derivative_is_refused(x):
    def twice(mesh):
        seq = ContextParallel(mesh).plan(x.shape[1])
        leaf = seq.shard(x, 1).requires_grad_()
        (grad,) = torch.autograd.grad(seq.attention(leaf, leaf, leaf).sum(), leaf, create_graph=True)
        grad.sum().backward()

    with pytest.raises(RuntimeError, match="attention over ranks has no second derivative"):
        run_ranks(2, twice)


def test_lse_is_not_differentiable(x):
    seq = ContextParallel().plan(x.shape[1])
    leaf = x.clone().requires_grad_()
    out, lse = torch.ops.hydra_dist.context_attention(leaf, leaf, leaf, seq.handle, True, -1, 0.5)
    assert out.requires_grad
    assert not lse.requires_grad


def test_a_plan_is_freed_with_its_last_user_and_not_before(x):
    context = ContextParallel()
    seq = context.plan(x.shape[1], torch.zeros(1, x.shape[1], dtype=torch.int64))
    watch, handle = weakref.ref(seq), seq.handle
    assert HANDLES.get(handle) is seq
    leaf = x.clone().requires_grad_()
    out = seq.attention(leaf, leaf, leaf)
    del seq
    assert watch() is not None  # the backward pass still needs it
    out.sum().backward()
    del out
    assert watch() is None  # freed at once, without the cycle collector
    with pytest.raises(RuntimeError, match="no longer exists"):
        HANDLES.get(handle)


def test_a_plan_that_is_gone_is_named(x):
    handle = ContextParallel().plan(x.shape[1]).handle
    with pytest.raises(RuntimeError, match=f"plan {handle} of a context-parallel sequence no longer exists"):
        torch.ops.hydra_dist.context_attention(x, x, x, handle, True, -1, 0.5)


def test_handles_are_never_reused():
    class Plan:
        strategy = None

    handles, first = Handles(), Plan()
    number = handles.add(first)
    assert handles.get(number) is first
    del first
    assert handles.add(Plan()) != number


@pytest.mark.parametrize("logit_bound", [(), (20.0,)])
def test_the_operator_passes_pytorchs_own_checks(x, logit_bound):
    seq = ContextParallel().plan(x.shape[1])
    leaves = [x.clone().requires_grad_() for _ in range(3)]
    arguments = (*leaves, seq.handle, True, 7, 0.5, *logit_bound)
    torch.library.opcheck(torch.ops.hydra_dist.context_attention.default, arguments)


def test_compiled_code_takes_one_plan_after_another(x):
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    context = ContextParallel()
    compiled = torch.compile(layers, backend=backend, fullgraph=True)
    plans = [context.plan(x.shape[1]) for _ in range(6)]
    for seq in plans:
        torch.testing.assert_close(compiled(seq, x), layers(seq, x), rtol=0, atol=0)
    assert len(traced) <= 2  # once with the handle as a constant, once with it as an input
