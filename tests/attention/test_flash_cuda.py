"""What the CUDA operators are called with. They run on a GPU only (tests/gpu); here their schemas and shape rules are
checked with tensors without data, and the preparation around them with stand-ins that compute on the CPU."""

import pytest
import torch

from hydra_dist.attention import flash_cuda, reference
from hydra_dist.attention.band import Band
from hydra_dist.attention.launch import Launch

BAND = Band(40, 50, 19, 20)


@pytest.fixture(params=[(8, 0), (7, 5)], ids=["Ampere", "Turing"])
def capability(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 20, 320])
@pytest.mark.parametrize("band", [None, BAND])
def test_schemas_and_shapes(capability, dtype, head_dim, band):
    q = torch.empty(2, 40, 4, head_dim, dtype=dtype, device="meta")
    k = torch.empty(2, 40 if band is None else 50, 2, head_dim, dtype=dtype, device="meta")
    launch = Launch(0.1, band is None, band)
    out, lse = flash_cuda.forward(q, k, k, launch)
    assert out.shape == q.shape
    assert out.dtype == dtype
    assert lse.shape == (2, 4, 40)
    assert lse.dtype == torch.float32
    grads = flash_cuda.backward(torch.empty_like(q), q, k, k, out.float(), lse, launch)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, k.shape]
    assert grads[1].dtype == grads[2].dtype == torch.float32


def check_operands(q, k, v):
    assert q.shape[1] == k.shape[1] == v.shape[1], "one key head for each query head"
    assert q.shape[-1] % 8 == 0
    assert all(x.stride(-1) == 1 for x in (q, k, v))


def rows(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def allowed_by(q, k, bias, causal):
    if bias is not None:
        assert not causal
        assert bias.shape == (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        assert bias.stride(2) % 16 == 0
        assert bias.dtype == q.dtype
        return bias[:, 0] == 0
    return Band(q.shape[2], k.shape[2], 0, None).allowed("cpu") if causal else None


class StandIns:
    """The four operators, computed by the reference, with the checks that the CUDA kernels make of their operands."""

    def __init__(self):
        self.called = []

    def flash(self, q, k, v, dropout, causal, debug, *, scale):
        self.called.append("flash")
        check_operands(q, k, v)
        assert not causal or q.shape[2] == k.shape[2]
        out, lse = reference.forward(*rows(q, k, v), allowed_by(q, k, None, causal), scale)
        return out.transpose(1, 2), lse, None, None, q.shape[2], k.shape[2], None, None, None

    def flash_backward(
        self, grad_out, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, seed, offset, *, scale
    ):
        check_operands(q, k, v)
        assert (cum_q, cum_k, max_q, max_k, dropout) == (None, None, q.shape[2], k.shape[2], 0.0)
        assert lse.is_contiguous()
        assert grad_out.shape == out.shape == q.shape
        assert out.dtype == q.dtype
        grads = reference.backward(*rows(grad_out, q, k, v, out), lse, allowed_by(q, k, None, causal), scale)
        return rows(*grads)

    def efficient(self, q, k, v, bias, compute_lse, dropout, causal, *, scale):
        self.called.append("efficient")
        check_operands(q, k, v)
        assert compute_lse
        out, lse = reference.forward(*rows(q, k, v), allowed_by(q, k, bias, causal), scale)
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
        return out.transpose(1, 2), padded, None, None

    def efficient_backward(self, grad_out, q, k, v, bias, out, lse, seed, offset, dropout, wanted, causal, *, scale):
        check_operands(q, k, v)
        length = q.shape[2]
        assert lse.shape[-1] % 32 == 0
        assert lse.is_contiguous()
        assert bool((lse[..., length:] == torch.inf).all())
        assert wanted == [True, True, True, False]
        grads = reference.backward(
            *rows(grad_out, q, k, v, out), lse[..., :length], allowed_by(q, k, bias, causal), scale
        )
        return *rows(*grads), None


@pytest.fixture
def stand_ins(monkeypatch):
    these = StandIns()
    prefix = "_scaled_dot_product_"
    for name in ("flash", "efficient"):
        monkeypatch.setattr(torch.ops.aten, f"{prefix}{name}_attention", getattr(these, name))
        monkeypatch.setattr(torch.ops.aten, f"{prefix}{name}_attention_backward", getattr(these, f"{name}_backward"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return these


@pytest.mark.parametrize(("heads", "head_dim"), [((4, 4), 16), ((4, 2), 20), ((3, 1), 5)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("band", [None, BAND])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_preparation(stand_ins, inputs, difference, heads, head_dim, causal, band, dtype):
    if band is not None and causal:
        causal = False
    q, k, v, grad_out = inputs(2, 40, 40 if causal else 50, heads, head_dim, dtype)
    allowed = band.allowed("cpu") if band is not None else Band(40, 40, 0, None).allowed("cpu") if causal else None
    launch = Launch(0.3, causal, band)
    out, lse = flash_cuda.forward(q, k, v, launch)
    expected, expected_lse = reference.forward(q, k, v, allowed, 0.3)
    assert difference(out, expected) < 1e-6
    assert difference(lse, expected_lse) < 1e-6
    grads = flash_cuda.backward(grad_out, q, k, v, out, lse, launch)
    for ours, theirs in zip(
        grads, reference.backward(grad_out, q, k, v, out.to(dtype), lse, allowed, 0.3), strict=True
    ):
        assert difference(ours, theirs) < 2e-6
    assert stand_ins.called == ["flash" if dtype == torch.float16 and band is None else "efficient"]


def test_what_is_refused(capability):
    cuda = torch.device("cuda")
    assert "float64" in flash_cuda.refuses(cuda, torch.float64, 16, "tile")
    assert flash_cuda.refuses(cuda, torch.float32, 16, "edge") is None
    assert flash_cuda.refuses(cuda, torch.float16, 16, "square") is None
    assert (flash_cuda.refuses(cuda, torch.bfloat16, 16, "tile") is None) == (capability >= (8, 0))
    assert "positions" in flash_cuda.refuses(cuda, torch.float16, 16, "any")
    for form in ("window", "documents"):
        assert (flash_cuda.refuses(cuda, torch.float16, 16, form) is None) == (capability >= (8, 0))
        assert "float32" in flash_cuda.refuses(torch.device("cuda"), torch.float32, 16, form) or capability < (8, 0)
