"""The differentiable operator: every mask, dtype and head layout against the reference and autograd."""

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hydra_dist.attention import Mask, attention, explain, reference
from hydra_dist.errors import ConfigError

LENGTH = 97


def run(tensors, mask, **options):
    *leaves, grad_out = (x.detach().clone() for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    out, lse = attention(*leaves, mask, **options)
    return out, lse, *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))


def by_autograd(tensors, mask):
    """Plain tensor operations and autograd; every query must see a key."""
    q, k, v, grad_out = tensors
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    scores = torch.einsum("bqhgd,bkhd->bhgqk", q.unflatten(2, (-1, groups)), k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask.allowed(q.shape[1], k.shape[1])[:, None, None], -torch.inf)
    out = torch.einsum("bhgqk,bkhd->bqhgd", scores.softmax(-1), v).flatten(2, 3)
    return out, scores.logsumexp(-1).flatten(1, 2), *torch.autograd.grad(out, (q, k, v), grad_out)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (8, 1), (3, 1)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_fp64(inputs, difference, mask, heads, backend):
    tensors = inputs(q_length=LENGTH, heads=heads)
    for ours, expected in zip(run(tensors, mask, backend=backend), by_autograd(tensors, mask), strict=True):
        assert difference(ours, expected) < 1e-12


@pytest.mark.parametrize("head_dim", [1, 20, 64, 96, 128])
def test_head_dims(inputs, difference, head_dim):
    tensors = inputs(q_length=40, head_dim=head_dim)
    mask = Mask(window=30)
    for ours, expected in zip(run(tensors, mask), by_autograd(tensors, mask), strict=True):
        assert difference(ours, expected) < 1e-12


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False), Mask(window=5)], ids=str)
@pytest.mark.parametrize("lengths", [(33, 33), (33, 9), (1, 1), (1, 20), (600, 300)])
def test_lengths(inputs, difference, lengths, mask):
    """Where queries outnumber keys by more than the window, the last ones see nothing."""
    tensors = inputs(1, *lengths)
    allowed = mask.allowed(*lengths)
    out, lse = reference.forward(*tensors[:3], allowed, 0.25)
    expected = out, *reference.backward(tensors[3], *tensors[:3], out, lse, allowed, 0.25)
    out, ours_lse, *grads = run(tensors, mask)
    assert torch.equal(ours_lse == -torch.inf, ~allowed.any(2)[:, None].expand_as(lse))
    for ours, theirs in zip((out, *grads), expected, strict=True):
        assert difference(ours, theirs) < 1e-12


def test_positions(inputs, difference):
    """Some queries of a sequence, out of order, over some of its keys."""
    starts = torch.tensor([0, 0, 0, 3, 3, 3, 3, 3, 8, 8, 8, 8])
    q_positions, k_positions = torch.tensor([8, 9, 10, 2, 7]), torch.tensor([0, 1, 2, 5, 6, 7, 8, 9])
    mask = Mask(
        document_starts=starts[q_positions][None],
        k_document_starts=starts[k_positions][None],
        q_positions=q_positions,
        k_positions=k_positions,
    )
    tensors = inputs(2, 5, 8)
    for ours, expected in zip(run(tensors, mask), by_autograd(tensors, mask), strict=True):
        assert difference(ours, expected) < 1e-12


def test_the_checks_above_reject_wrong_masks(inputs, difference):
    starts = torch.tensor([0, 30, 31]).repeat_interleave(torch.tensor([30, 1, 66]))[None]
    tensors = inputs(q_length=LENGTH)
    right = by_autograd(tensors, Mask(window=20, document_starts=starts))
    for wrong in (Mask(window=19, document_starts=starts), Mask(window=21, document_starts=starts), Mask(window=20)):
        for ours, expected in zip(run(tensors, wrong), right, strict=True):
            assert difference(ours, expected) > 1e-3


def test_fp32(inputs, difference, mask):
    tensors = [x.float() for x in inputs(q_length=LENGTH, head_dim=64)]
    expected = by_autograd([x.double() for x in tensors], mask)
    for ours, exact, bound in zip(run(tensors, mask), expected, (1e-6, 1e-6, 5e-6, 5e-6, 5e-6), strict=True):
        assert difference(ours, exact) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(inputs, dtype):
    """No worse than PyTorch's own operator in that dtype, by root mean square error against fp64."""
    tensors = [x.to(dtype) for x in inputs(1, 200, heads=(4, 1), head_dim=64)]
    exact = by_autograd([x.double() for x in tensors], Mask())
    results = run(tensors, Mask())
    q, k, v, grad_out = (x.transpose(1, 2) for x in tensors)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad_out, q, k, v, out, lse, 0.0, True)
    native = [x.transpose(1, 2) for x in (out, *grads)]
    assert [x.dtype for x in results] == [dtype, torch.float32, dtype, dtype, dtype]
    for ours, theirs, true in zip((results[0], *results[2:]), native, (exact[0], *exact[2:]), strict=True):
        assert (ours.double() - true).norm() <= 1.02 * (theirs.double() - true).norm()


def test_scale_and_out_dtype(inputs, difference):
    q, k, v, _ = inputs(1, 20)
    expected, _ = reference.forward(q, k, v, Mask().allowed(20, 20), 0.7)
    assert difference(attention(q, k, v, scale=0.7)[0], expected) < 1e-13
    out, lse = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), out_dtype=torch.float32)
    assert out.dtype == lse.dtype == torch.float32
    exact, _ = attention(*(x.bfloat16().double() for x in (q, k, v)))
    assert difference(out, exact) < 1e-6
    for backend in ("flash", "reference"):
        tensors = [x.bfloat16() for x in inputs(1, 20)]
        assert run(tensors, Mask(), backend=backend, out_dtype=torch.float32)[2].dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["flash", "reference"])
def test_rows_without_keys_give_and_take_nothing(inputs, backend):
    mask = Mask(k_positions=torch.arange(4, 10), q_positions=torch.arange(10))
    tensors = inputs(1, 10, 6)
    out, lse, *grads = run(tensors, mask, backend=backend)
    assert not out[:, :4].any()
    assert bool((lse[..., :4] == -torch.inf).all())
    assert not grads[0][:, :4].any()
    tensors[3][:, :4] *= 1e6
    assert all(torch.equal(a, b) for a, b in zip(run(tensors, mask, backend=backend)[2:], grads, strict=True))


@pytest.mark.parametrize("backend", ["flash", "reference"])
def test_empty_inputs(inputs, backend):
    for lengths, batch_size in (((0, 5), 1), ((5, 0), 1), ((0, 0), 1), ((5, 5), 0)):
        tensors = inputs(batch_size, *lengths)
        out, lse, *grads = run(tensors, Mask(), backend=backend)
        assert out.shape == tensors[0].shape
        assert lse.shape == (batch_size, 4, lengths[0])
        assert not out.any()
        assert bool((lse == -torch.inf).all())
        assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize(
    "mask",
    [Mask(), Mask(window=3), Mask(document_starts=torch.tensor([[0, 0, 2, 2, 2, 5]]), q_positions=torch.arange(6))],
    ids=["causal", "window", "documents"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_is_a_proper_operator(inputs, mask, dtype):
    """Schema, fake implementation and autograd registration hold what PyTorch asks of them."""
    q, k, v, _ = (x.to(dtype) for x in inputs(1, 6))
    arguments = (mask.document_starts, mask.k_document_starts, mask.q_positions, mask.k_positions)
    arguments = (*arguments, mask.causal, mask.window, 0.25, "auto", dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.hydra_dist.attention.default, (*leaves, *arguments), test_utils=tests)


@pytest.mark.parametrize(
    "mask",
    [
        Mask(causal=True),
        Mask(window=6),
        Mask(document_starts=torch.tensor([[0] * 8 + [8] * 12])),
        Mask(window=6, document_starts=torch.tensor([[0] * 8 + [8] * 12])),
    ],
    ids=["causal", "window", "documents", "documents, window"],
)
def test_compiled_as_one_node(inputs, mask):
    tensors = inputs(1, 20)
    nodes = []

    def look(graph, _):
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def layer(q, k, v):
        return attention(q * 2, k, v, mask=mask)[0] * 3

    compiled = torch.compile(layer, backend=look, fullgraph=True)
    assert torch.equal(compiled(*tensors[:3]), layer(*tensors[:3]))
    assert sum("hydra_dist.attention" in node for node in nodes) == 1

    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in tensors[:3]]
        results.append(torch.autograd.grad(function(*leaves), leaves, tensors[3]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiled_with_a_mask_made_inside(inputs):
    """The mask may be made in the compiled function, of tensors that are its inputs."""

    def layer(q, k, v, starts):
        causal = attention(q, k, v, mask=Mask(causal=True))[0]
        return causal + attention(q, k, v, Mask(window=6, document_starts=starts), backend="flash")[0]

    tensors, starts = inputs(1, 20), torch.tensor([[0] * 8 + [8] * 12])
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*tensors[:3], starts), layer(*tensors[:3], starts))
    with pytest.raises(ConfigError, match="cannot be used here"):
        torch.compile(lambda q: attention(q, q, q, backend="cudnn")[0], backend="eager", fullgraph=True)(tensors[0])


def test_selective_checkpointing_keeps_it(inputs, monkeypatch):
    tensors = inputs(1, 20)
    calls = []
    from hydra_dist.attention import operator

    real = operator.attend_tiles
    monkeypatch.setattr(operator, "attend_tiles", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))

    def layer(q, k, v):
        return attention(q * 2, k, v)[0] * 3

    def policy(ctx, op, *args, **kwargs):
        keep = op == torch.ops.hydra_dist.attention.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts():
        return create_selective_checkpoint_contexts(policy)

    grads = []
    for options, expected in (({"context_fn": contexts}, 1), ({}, 2)):
        calls.clear()
        leaves = [x.clone().requires_grad_() for x in tensors[:3]]
        out = checkpoint(layer, *leaves, use_reentrant=False, **options)
        grads.append(torch.autograd.grad(out, leaves, tensors[3]))
        assert len(calls) == expected
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_lse_and_gradients_are_not_differentiable(inputs):
    q, k, v, _ = inputs(1, 8)
    q.requires_grad_()
    out, lse = attention(q, k, v)
    assert not lse.requires_grad
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
    with torch.no_grad():
        assert not attention(q, k, v)[0].requires_grad


def test_inference_mode_leaves_nothing_behind(inputs):
    """Masks are kept between calls; those made without autograd serve the training that follows."""
    tensors = inputs(1, 300)
    with torch.inference_mode():
        attention(*(x.clone() for x in tensors[:3]), Mask(window=37))
    run(tensors, Mask(window=37))


def test_explain(inputs):
    q, k, _, _ = inputs(1, 100)
    assert "flash" in explain(q, k)
    assert "asked for" in explain(q, k, backend="reference")
    scattered = torch.randperm(100)
    line = explain(q, k, Mask(q_positions=scattered, k_positions=scattered))
    assert "backend reference" in line
    assert "not flash" in line
    assert "scattered" in line


def test_scattered_positions_give_the_same(inputs, difference):
    order = torch.randperm(100)
    mask = Mask(q_positions=order, k_positions=order)
    tensors = inputs(1, 100, heads=(2, 1), head_dim=8)
    for a, b in zip(run(tensors, mask), run([x[:, order.argsort()] for x in tensors], Mask()), strict=True):
        b = b[:, order] if b.dim() == 4 else b[..., order]
        assert difference(a, b) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "q has shape"),
        (lambda q, k, v: (q, k, v[..., 0]), "v has shape"),
        (lambda q, k, v: (q, k.float(), v), "k is torch.float32 and q is torch.float64"),
        (lambda q, k, v: (q, k.to("meta"), v), "k is on meta"),
        (lambda q, k, v: (q, k[:1], v[:1]), "k has 1 batch rows and q has 2"),
        (lambda q, k, v: (q, k[..., :8], v[..., :8]), "k has head_dim 8 and q has 16"),
        (lambda q, k, v: (q, k, v[:, :5]), "must be the same"),
        (lambda q, k, v: (q, k.repeat(1, 1, 2, 1)[:, :, :3], v.repeat(1, 1, 2, 1)[:, :, :3]), "1 or 2 or 4 key heads"),
    ],
)
def test_inputs_that_do_not_fit(inputs, change, message):
    q, k, v, _ = inputs(2, 9)
    with pytest.raises(ValueError, match=message):
        attention(*change(q, k, v))


def test_settings_that_do_not_fit(inputs):
    q, k, v, _ = inputs(2, 9)
    with pytest.raises(ConfigError, match='did you mean "flash"'):
        attention(q, k, v, backend="flsh")
    with pytest.raises(ValueError, match="no floating dtype"):
        attention(q, k, v, out_dtype=torch.int32)
    with pytest.raises(ValueError, match="runs over 2 batch rows"):
        attention(q, k, v, Mask(document_starts=torch.zeros(3, 9, dtype=torch.long)))
