"""One tile at a time: the fused operators against the reference, forward and backward."""

import pytest
import torch

from hydra_dist.attention import flash, reference
from hydra_dist.attention.band import Band
from hydra_dist.attention.launch import Launch

TILES = {
    "full": (48, 70, False, None),
    "one query": (1, 70, False, None),
    "one pair": (1, 1, True, None),
    "causal": (70, 70, True, None),
    "causal, several blocks": (300, 300, True, None),
    "band": (48, 70, False, Band(48, 70, 22, 23)),
    "band, wide": (200, 900, False, Band(200, 900, 700, 701)),
}


@pytest.fixture(params=list(TILES))
def tile(request):
    return TILES[request.param]


def run(backend, tensors, causal, band, scale=0.3):
    q, k, v, grad_out = tensors
    if backend is flash:
        launch = Launch(scale, causal, band)
        out, lse = flash.forward(q, k, v, launch)
        return out, lse, *flash.backward(grad_out, q, k, v, out, lse, launch)
    if causal:
        band = Band(q.shape[1], k.shape[1], 0, None)
    allowed = None if band is None else band.allowed("cpu")
    out, lse = reference.forward(q, k, v, allowed, scale)
    return out, lse, *reference.backward(grad_out, q, k, v, out, lse, allowed, scale)


@pytest.mark.parametrize(("heads", "head_dim"), [((4, 2), 16), ((1, 1), 64), ((8, 1), 3), ((3, 3), 96), ((6, 3), 128)])
def test_fp64(inputs, difference, tile, heads, head_dim):
    q_length, k_length, causal, band = tile
    tensors = inputs(1, q_length, k_length, heads, head_dim)
    for ours, expected in zip(run(flash, tensors, causal, band), run(reference, tensors, causal, band), strict=True):
        assert ours.dtype == torch.float64
        assert difference(ours, expected) < 1e-12


def test_the_check_above_rejects_a_band_off_by_one(inputs, difference):
    tensors = inputs(1, 48, 70)
    right = run(reference, tensors, False, Band(48, 70, 22, 23))
    for wrong in (Band(48, 70, 22, 24), Band(48, 70, 23, 23)):
        for ours, expected in zip(run(flash, tensors, False, wrong), right, strict=True):
            assert difference(ours, expected) > 1e-3


def test_fp32(inputs, difference, tile):
    q_length, k_length, causal, band = tile
    tensors = [x.float() for x in inputs(2, q_length, k_length, (4, 2), 64)]
    expected = run(reference, [x.double() for x in tensors], causal, band, scale=0.125)
    bounds = (1e-6, 1e-6, 5e-6, 5e-6, 5e-6)
    for ours, exact, bound in zip(run(flash, tensors, causal, band, scale=0.125), expected, bounds, strict=True):
        assert difference(ours, exact) < bound


def test_views_with_any_strides(inputs, difference):
    q, k, v, grad_out = inputs(2, 20)
    expected = run(reference, (q, k, v, grad_out), True, None)
    views = [
        torch.cat([q, q], 3)[..., :16],
        k.transpose(1, 2).contiguous().transpose(1, 2),
        v.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        grad_out[:, :1].expand(-1, 20, -1, -1),
    ]
    assert views[2].stride(-1) != 1
    same = run(flash, (*views[:3], grad_out), True, None)
    expanded = run(reference, (q, k, v, views[3]), True, None)
    for ours, theirs in zip(same, expected, strict=True):
        assert difference(ours, theirs) < 1e-13
    for ours, theirs in zip(run(flash, views, True, None), expanded, strict=True):
        assert difference(ours, theirs) < 1e-13


def rms(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("limit", [64, 1024])
@pytest.mark.parametrize("small", [0, 512 * 512])
def test_bf16_backward_adds_up_in_fp32(inputs, monkeypatch, causal, limit, small):
    """Cut or not, with shared heads, it loses no more than the operator by itself with one head each."""
    monkeypatch.setattr(flash, "_LONGEST_BF16_BACKWARD", limit)
    monkeypatch.setattr(flash, "_LARGEST_FP32_BACKWARD", small)
    tensors = [x.bfloat16() for x in inputs(1, 200, heads=(4, 1), head_dim=64)]
    exact = run(reference, [x.double() for x in tensors], causal, None, scale=0.125)
    q, k, v, grad_out = tensors
    launch = Launch(0.125, causal)
    out, lse = flash.forward(q.float(), k.float(), v.float(), launch)
    assert rms(out, exact[0]) < 1e-6
    arguments = grad_out, q, k, v, out.bfloat16(), lse, launch
    ours = flash.backward(*arguments)
    native = flash._backward_cpu(*arguments)
    assert (ours[0].dtype == torch.float32) == (small > 0 or limit == 64)
    assert ours[1].dtype == ours[2].dtype == torch.float32
    for grad, own, true in zip(ours, native, exact[2:], strict=True):
        assert rms(grad, true) < 5e-3
        assert rms(grad, true) < 1.02 * rms(own, true)


def test_what_is_computed_in_what():
    cpu = torch.device("cpu")
    assert flash.forward_dtype(cpu, torch.bfloat16) == torch.float32
    assert flash.backward_dtype(cpu, torch.bfloat16) == torch.bfloat16
    assert flash.backward_dtype(cpu, torch.float16) == torch.float32
    assert flash.forward_dtype(torch.device("cuda"), torch.bfloat16) == torch.bfloat16
    assert all(flash.forward_dtype(cpu, d) == d == flash.backward_dtype(cpu, d) for d in (torch.float32, torch.float64))


def test_what_is_refused():
    assert flash.refuses(torch.device("cpu"), torch.float64, 16, "tile") is None
    assert flash.refuses(torch.device("cpu"), torch.float64, 16, "edge") is None
    assert "tile by tile" in flash.refuses(torch.device("cpu"), torch.float64, 16, "window")
    assert "float8" in flash.refuses(torch.device("cpu"), torch.float8_e4m3fn, 16, "tile")
    assert "meta" in flash.refuses(torch.device("meta"), torch.float32, 16, "tile")
    assert "float64" in flash.refuses(torch.device("cuda"), torch.float64, 16, "tile")
