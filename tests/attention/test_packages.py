"""The calls of FlashAttention 2, 3 and 4 and cuDNN: arguments, layouts, windows and shapes, against stand-ins with the
packages' own signatures that compute by the reference. That the kernels themselves are right is tried on a GPU."""

import pytest
import torch

from hydra_dist.attention import Mask, cudnn, flash_cuda, flash_family, reference
from hydra_dist.attention.band import Band
from hydra_dist.attention.launch import Launch, launch_of, need_of

PACKED = torch.tensor([[0] * 1 + [1] * 20 + [21] * 1 + [22] * 18, [0] * 39 + [39]])
MASKS = {
    "full": (Mask(causal=False), 40, 50),
    "causal": (Mask(), 40, 40),
    "window": (Mask(window=7), 40, 40),
    "window, later queries": (Mask(window=7, q_positions=torch.arange(10, 50)), 40, 50),
    "documents": (Mask(document_starts=PACKED), 40, 40),
    "documents, full": (Mask(causal=False, document_starts=PACKED), 40, 40),
    "documents, window": (Mask(window=5, document_starts=PACKED), 40, 40),
}
EDGE = Band(40, 50, 19, 20)


def against_reference(module, tensors, launch, allowed, difference, bound=1e-12):
    q, k, v, grad_out = tensors
    out, lse = module.forward(q, k, v, launch)
    expected = reference.forward(q, k, v, allowed, launch.scale)
    grads = module.backward(grad_out, q, k, v, out, lse, launch)
    expected_grads = reference.backward(grad_out, q, k, v, *expected, allowed, launch.scale)
    for ours, theirs in zip((out, lse, *grads), (*expected, *expected_grads), strict=True):
        assert difference(ours, theirs) < bound


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
@pytest.mark.parametrize("shape", list(MASKS))
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 4), 8), ((4, 2), 20), ((8, 1), 16)])
def test_packages(install, inputs, difference, packages, name, shape, heads, head_dim):
    kernel = install(name)
    mask, *lengths = MASKS[shape]
    tensors = inputs(2, *lengths, heads, head_dim)
    launch = launch_of(mask, need_of(mask, *lengths).form, *tensors[:2], 0.3)
    against_reference(packages[name], tensors, launch, mask.allowed(*lengths), difference)
    assert kernel.calls == ["forward", "backward"]


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
def test_edges_and_views(install, inputs, difference, packages, name):
    """Tiles along a window's edge, of tensors that are pieces of others."""
    install(name)
    q, k, v, grad_out = inputs(2, 60, 60, (4, 2), 16)
    tensors = [q[:, 3:43], k[:, :50], v.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)[:, 10:], grad_out[:, 20:]]
    against_reference(packages[name], tensors, Launch(0.3, band=EDGE), EDGE.allowed("cpu"), difference)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
def test_the_checks_above_reject_a_window_off_by_one(install, inputs, difference, packages, name):
    install(name)
    tensors = inputs(2, 40, 50, (4, 2), 16)
    for wrong in (Band(40, 50, 19, 21), Band(40, 50, 20, 20)):
        with pytest.raises(AssertionError):
            against_reference(packages[name], tensors, Launch(0.3, band=wrong), EDGE.allowed("cpu"), difference)


def test_dtypes_of_out(install, inputs, packages):
    """Running results are wider than the inputs; the packages take one dtype."""
    install("flash_attention_2")
    q, k, v, grad_out = inputs(1, 16, dtype=torch.bfloat16)
    out, lse = packages["flash_attention_2"].forward(q, k, v, Launch(0.3, causal=True))
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    packages["flash_attention_2"].backward(grad_out, q, k, v, out.float(), lse, Launch(0.3, causal=True))


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_backward_is_deterministic_where_torch_is_told_to_be(install, inputs, packages, monkeypatch, deterministic):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    asked = []
    for name, module in packages.items():
        kernel = install(name)
        q, k, v, grad_out = inputs(1, 16)
        out, lse = module.forward(q, k, v, Launch(0.3, causal=True))
        module.backward(grad_out, q, k, v, out, lse, Launch(0.3, causal=True))
        asked.append(kernel.deterministic)
    assert asked == [deterministic] * 3
    reason = cudnn.refuses(torch.device("cuda"), torch.bfloat16, 64, "square") if deterministic else "deterministic"
    assert "deterministic" in reason


class Operators:
    """PyTorch's cuDNN and flash operators by the reference, with what their CUDA code asks of its operands."""

    def __init__(self, kernel):
        self.kernel = kernel

    def cudnn(self, q, k, v, bias, compute_lse, dropout, causal, debug, *, scale):
        assert (bias, compute_lse, dropout, debug) == (None, True, 0.0, False)
        assert all(x.transpose(1, 2).is_contiguous() and x.shape[3] % 8 == 0 for x in (q, k, v))
        allowed = Band(q.shape[2], k.shape[2], 0, None).allowed("cpu") if causal else None
        out, lse = reference.forward(*(x.transpose(1, 2) for x in (q, k, v)), allowed, scale)
        nothing = torch.empty(0, dtype=torch.int64)
        out = out.to(q.dtype).contiguous().transpose(1, 2)
        return out, lse.unsqueeze(-1), None, None, q.shape[2], k.shape[2], nothing, nothing, None

    def cudnn_backward(
        self, grad_out, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout, causal, *, scale
    ):
        assert (bias, cum_q, cum_k, max_q, max_k, dropout) == (None, None, None, q.shape[2], k.shape[2], 0.0)
        assert seed.dtype == offset.dtype == torch.int64
        assert lse.shape == (*q.shape[:3], 1)
        assert lse.is_contiguous()
        assert all(x.transpose(1, 2).is_contiguous() for x in (grad_out, q, k, v, out))
        allowed = Band(q.shape[2], k.shape[2], 0, None).allowed("cpu") if causal else None
        rows = [x.transpose(1, 2) for x in (grad_out, q, k, v, out)]
        return [x.transpose(1, 2) for x in reference.backward(*rows, lse[..., 0], allowed, scale)]

    def flash(self, q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, debug, **options):
        left, right = options["window_size_left"], options["window_size_right"]
        assert (dropout, debug, causal) == (0.0, False, right == 0)
        assert cum_q is cum_k
        assert (max_q, max_k) == (q.shape[1], k.shape[1]) or cum_q is not None
        out, lse = self.kernel.forward(q, k, v, options["scale"], left, right, cum_q, max_q)
        return out, lse, None, None, None

    def flash_backward(
        self, grad_out, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, seed, offset, **options
    ):
        left, right = options["window_size_left"], options["window_size_right"]
        assert (dropout, causal) == (0.0, right == 0)
        assert seed.dtype == offset.dtype == torch.uint64
        grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
        self.kernel.backward(grads, grad_out, q, k, v, out, lse, options["scale"], left, right, cum_q, max_q)
        return grads


@pytest.fixture
def operators(monkeypatch, kernel):
    these = Operators(kernel)
    for name, function in (
        ("_scaled_dot_product_cudnn_attention", these.cudnn),
        ("_scaled_dot_product_cudnn_attention_backward", these.cudnn_backward),
        ("_flash_attention_forward", these.flash),
        ("_flash_attention_backward", these.flash_backward),
    ):
        monkeypatch.setattr(torch.ops.aten, name, function)
    return these


@pytest.mark.parametrize("shape", ["full", "causal"])
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 4), 8), ((4, 2), 20), ((8, 1), 16)])
def test_cudnn(operators, inputs, difference, shape, heads, head_dim):
    mask, *lengths = MASKS[shape]
    tensors = inputs(2, *lengths, heads, head_dim)
    against_reference(cudnn, tensors, Launch(0.3, mask.causal), mask.allowed(*lengths), difference)


@pytest.mark.parametrize("shape", [name for name in MASKS if "window" in name or "documents" in name])
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 2), 20), ((8, 1), 16)])
def test_whole_masks_by_pytorch(operators, inputs, difference, monkeypatch, shape, heads, head_dim):
    """Windows larger than the tiles along their edge, and documents, go to FlashAttention as they are."""
    monkeypatch.setattr(flash_cuda, "LARGEST_BLOCK", 30)
    mask, *lengths = MASKS[shape]
    tensors = inputs(2, *lengths, heads, head_dim)
    launch = launch_of(mask, need_of(mask, *lengths).form, *tensors[:2], 0.3)
    against_reference(flash_cuda, tensors, launch, mask.allowed(*lengths), difference)
    assert operators.kernel.calls == ["forward", "backward"]


@pytest.mark.parametrize("q_length", [1, 40])
@pytest.mark.parametrize("documents", [False, True])
def test_schemas(q_length, documents):
    """PyTorch's own shape rules take the arguments and give these shapes."""
    mask = Mask(document_starts=torch.zeros(1, 40, dtype=torch.long)) if documents else Mask(window=7)
    q, k = (torch.empty(2, 1100, 4, 64, dtype=torch.float16, device="meta") for _ in range(2))
    if documents:
        q, k = q[:, :40], k[:, :40]
    launch = launch_of(mask, "documents" if documents else "window", q, k, 0.1)
    out, lse = flash_cuda.forward(q, k, k, launch)
    assert (out.shape, lse.shape) == (q.shape, (2, 4, q.shape[1]))
    assert [x.shape for x in flash_cuda.backward(out, q, k, k, out, lse, launch)] == [q.shape] * 3
    q = q[:, :q_length, :2]
    out, lse = cudnn.forward(q, k[:, :, :1], k[:, :, :1], Launch(0.1))
    assert (out.shape, lse.shape) == (q.shape, (2, 2, q_length))
    grads = cudnn.backward(out, q, k[:, :, :1], k[:, :, :1], out, lse, Launch(0.1))
    assert [x.shape for x in grads] == [q.shape, *[k[:, :, :1].shape] * 2]


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "expected"),
    [
        ((9, 0), torch.bfloat16, 128, None),
        ((7, 5), torch.float16, 128, "8.x to 9.x"),
        ((10, 0), torch.float16, 128, "8.x to 9.x"),
        ((9, 0), torch.float32, 128, "float32"),
        ((9, 0), torch.float16, 264, "head_dim up to 256"),
    ],
)
def test_what_is_refused(monkeypatch, capability, dtype, head_dim, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    reason = flash_family.refuses("it", torch.device("cuda"), dtype, head_dim, 8, 9)
    assert reason is expected or expected in reason
    assert "cpu" in flash_family.refuses("it", torch.device("cpu"), dtype, head_dim, 8, 9)


def test_which_masks_are_refused(packages, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    where = torch.device("cuda"), torch.bfloat16, 64
    for module in packages.values():
        assert "no positions" in module.refuses(*where, "any")
        assert all(
            module.refuses(*where, f) is None for f in ("tile", "edge", "square", "rectangle", "window", "documents")
        )
    assert cudnn.refuses(*where, "square") is None
    assert all(cudnn.refuses(*where, f) for f in ("tile", "edge", "rectangle", "window", "documents", "any"))
