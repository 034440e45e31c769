"""Attention's fused operators on a GPU against the reference in fp64."""

import pytest
import torch

from hydra_dist.attention import Mask, attend_tiles, attend_tiles_backward, attention, explain, reference
from hydra_dist.costs.tiles import Span, tiles

LENGTH = 200
STARTS = torch.tensor([0, 1, 90, 91, 150]).repeat_interleave(torch.tensor([1, 89, 1, 59, 50]))[None]
MASKS = {
    "causal": Mask(),
    "full": Mask(causal=False),
    "window 1": Mask(window=1),
    "window 40": Mask(window=40),
    "documents": Mask(document_starts=STARTS),
    "documents per batch row": Mask(document_starts=torch.cat([STARTS, torch.zeros_like(STARTS)])),
    "later queries": Mask(q_positions=torch.arange(100, 100 + LENGTH)),
}
PAIRS = [((4, 4), 64), ((8, 2), 128), ((4, 1), 96), ((3, 1), 20), ((2, 1), 256)]


def make(dtype, heads, head_dim):
    torch.manual_seed(0)
    counts = (heads[0], heads[1], heads[1], heads[0])
    return [torch.randn(2, LENGTH, count, head_dim).to("cuda", dtype) for count in counts]


def exactly(tensors, mask):
    q, k, v, grad_out = (x.double() for x in tensors)
    allowed, scale = mask.allowed(LENGTH, LENGTH, "cuda"), q.shape[-1] ** -0.5
    out, lse = reference.forward(q, k, v, allowed, scale)
    return out, *reference.backward(grad_out, q, k, v, out, lse, allowed, scale)


def run(tensors, mask, backend):
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    out, lse = attention(*leaves, mask, backend=backend)
    assert lse.shape == (2, leaves[0].shape[2], LENGTH)
    return out, *torch.autograd.grad(out, leaves, tensors[3])


def rms(a, b):
    return ((a.double() - b).norm() / b.norm().clamp(min=1e-3 * b.numel() ** 0.5)).item()


@pytest.mark.parametrize("name", list(MASKS))
@pytest.mark.parametrize(("heads", "head_dim"), PAIRS)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)], ids=str
)
def test_against_fp64(name, heads, head_dim, dtype, bound):
    tensors = make(dtype, heads, head_dim)
    for ours, exact in zip(run(tensors, MASKS[name], "flash"), exactly(tensors, MASKS[name]), strict=True):
        assert ours.dtype == dtype
        assert rms(ours, exact) < bound


def test_the_check_above_rejects_a_window_off_by_one():
    tensors = make(torch.bfloat16, (4, 2), 64)
    results = run(tensors, Mask(window=39), "flash")
    assert all(rms(a, b) > 2e-2 for a, b in zip(results, exactly(tensors, Mask(window=40)), strict=True))


def test_fp64_runs_in_the_reference():
    tensors = make(torch.float64, (4, 2), 64)
    assert "backend reference" in explain(*tensors[:2])
    for ours, exact in zip(run(tensors, Mask(window=40), "auto"), exactly(tensors, Mask(window=40)), strict=True):
        assert rms(ours, exact) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fresh", [False, True])
def test_keys_in_four_parts_lose_no_more_than_at_once(dtype, fresh):
    tensors = make(dtype, (8, 2), 64)
    q, k, v, grad_out = tensors
    out, lse = torch.zeros(q.shape, device="cuda"), torch.full((2, 8, LENGTH), -torch.inf, device="cuda")
    parts = []
    for start in range(0, LENGTH, 50):
        spans = (Span(0, LENGTH, 0),), (Span(0, 50, start),)
        keys = slice(start, start + 50)
        found = tiles(*spans, causal=True, window=None, documents=None)
        parts.append((keys, found))
        attend_tiles(q, k[:, keys], v[:, keys], found, scale=0.125, out=out, lse=lse, fresh=fresh and start == 0)
    grads = [torch.zeros(x.shape, device="cuda") for x in (q, k, v)]
    for keys, found in parts:
        attend_tiles_backward(
            grad_out,
            q,
            k[:, keys],
            v[:, keys],
            out,
            lse,
            found,
            scale=0.125,
            grad_q=grads[0],
            grad_k=grads[1][:, keys],
            grad_v=grads[2][:, keys],
        )
    exact = exactly(tensors, Mask())
    for part, whole, true in zip((out, *grads), run(tensors, Mask(), "flash"), exact, strict=True):
        assert rms(part.to(dtype), true) < 1.25 * rms(whole, true) + 1e-6
