"""Every implementation of attention that this GPU and its packages offer, against the reference in fp64.

A first run is mostly compilation (Triton, FlashAttention 4), one kernel for each dtype, group size and head_dim, so
what runs by default covers each value and not each combination; ``-m full`` runs them all.
"""

from importlib import import_module
from itertools import product

import pytest
import torch

from hydra_dist.attention import Mask, attend_tiles, attend_tiles_backward, attention, backends, explain, reference
from hydra_dist.attention.launch import need_of
from hydra_dist.attention.probe import Where
from hydra_dist.costs.tiles import Span, tiles
from hydra_dist.errors import ConfigError

choose = import_module("hydra_dist.attention.backends").choose  # the package has a function of that name
LENGTH = 200
STARTS = torch.tensor([0, 1, 90, 91, 150]).repeat_interleave(torch.tensor([1, 89, 1, 59, 50]))[None]
MASKS = {
    "causal": Mask(),
    "full": Mask(causal=False),
    "window": Mask(window=40),
    "window of one": Mask(window=1),
    "documents": Mask(document_starts=STARTS),
    "documents per batch row": Mask(document_starts=torch.cat([STARTS, torch.zeros_like(STARTS)])),
    "documents, window": Mask(window=40, document_starts=STARTS),
    "later queries": Mask(q_positions=torch.arange(100, 100 + LENGTH)),
    "two runs, documents": Mask(
        document_starts=STARTS[:, [*range(50), *range(150, 200)]],
        k_document_starts=STARTS,
        q_positions=torch.tensor([*range(50), *range(150, 200)]),
    ),
}
# dtype, query heads for each key head, head_dim
COVER = [(torch.bfloat16, 4, 128), (torch.bfloat16, 1, 64), (torch.float16, 8, 64), (torch.float32, 2, 128)]
ALL = list(product((torch.bfloat16, torch.float16, torch.float32), (1, 2, 4, 8), (64, 128)))


def make(dtype, groups, head_dim, q_length=LENGTH):
    torch.manual_seed(0)
    key_heads = max(1, 8 // groups)
    heads = (key_heads * groups, key_heads, key_heads, key_heads * groups)
    lengths = (q_length, LENGTH, LENGTH, q_length)
    shapes = zip(lengths, heads, strict=True)
    return [torch.randn(2, length, count, head_dim).to("cuda", dtype) for length, count in shapes]


def exactly(tensors, mask):
    q, k, v, grad_out = (x.double() for x in tensors)
    allowed, scale = mask.allowed(q.shape[1], k.shape[1], "cuda"), q.shape[-1] ** -0.5
    out, lse = reference.forward(q, k, v, allowed, scale)
    return out, lse, *reference.backward(grad_out, q, k, v, out, lse, allowed, scale)


def plainly(tensors, mask):
    """Plain attention in the inputs' own dtype throughout, differentiated by autograd."""
    *leaves, grad_out = tensors
    leaves = [x.detach().requires_grad_() for x in leaves]
    q, k, v = leaves
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    allowed = mask.allowed(q.shape[1], k.shape[1], "cuda").unsqueeze(1)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~allowed, -torch.inf)
    weights = scores.softmax(-1).masked_fill(~allowed, 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    return out, scores.logsumexp(-1), *torch.autograd.grad(out, leaves, grad_out)


def run(tensors, mask, backend):
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    out, lse = attention(*leaves, mask, backend=backend)
    assert lse.shape == (2, leaves[0].shape[2], leaves[0].shape[1])
    return out, lse, *torch.autograd.grad(out, leaves, tensors[3])


def where_of(tensors):
    q, k = tensors[:2]
    return Where(q.device, q.dtype, q.shape[3], q.shape[2] // k.shape[2])


def on_cuda(mask):
    fields = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in vars(mask).items()}
    return Mask(**fields)


def reasons(tensors, mask):
    """Each backend's reason against it, or None."""
    found = {}
    for name in backends():
        try:
            choose(name, where_of(tensors), need_of(mask, tensors[0].shape[1], tensors[1].shape[1]))
            found[name] = None
        except ConfigError as error:
            found[name] = str(error)
    return found


def rms(a, b):
    """|a - b| / |b|. Where b is zero but for rounding, the inputs' own size of 1 takes its place."""
    b = b.masked_fill(b == -torch.inf, 0.0)
    a = a.double().masked_fill(a == -torch.inf, 0.0)
    ones = b.numel() ** 0.5
    size = b.norm().item()
    return (a - b).norm().item() / (size if size > 1e-6 * ones else ones)


@pytest.mark.parametrize(("dtype", "groups", "head_dim"), COVER)
def test_what_is_available(dtype, groups, head_dim, capsys):
    """Says what there is. What is missing is no fault; a package that runs and gives wrong numbers is one."""
    with capsys.disabled():
        device = torch.cuda.get_device_name()
        print(f"\n{device}, torch {torch.__version__}: {dtype}, groups of {groups}, head_dim {head_dim}")
        for name, mask in MASKS.items():
            tensors = make(dtype, groups, head_dim, 100 if "two runs" in name else LENGTH)
            print(f"  {name}: {explain(*tensors[:2], mask)}")
            for backend, reason in reasons(tensors, mask).items():
                wrong = (
                    "is off by",
                    "has the shape",
                    "elsewhere than",
                    "TypeError",
                    "AttributeError",
                    "AssertionError",
                )
                assert reason is None or not any(sign in reason for sign in wrong), f"{backend}: {reason}"


@pytest.mark.parametrize("name", list(MASKS))
@pytest.mark.parametrize(("dtype", "groups", "head_dim"), COVER)
def test_against_fp64(name, groups, head_dim, dtype):
    check_against_fp64(name, groups, head_dim, dtype)


@pytest.mark.full
@pytest.mark.parametrize("name", list(MASKS))
@pytest.mark.parametrize(("dtype", "groups", "head_dim"), ALL)
def test_against_fp64_in_full(name, groups, head_dim, dtype):
    check_against_fp64(name, groups, head_dim, dtype)


def check_against_fp64(name, groups, head_dim, dtype):
    tensors = make(dtype, groups, head_dim, 100 if "two runs" in name else LENGTH)
    mask = on_cuda(MASKS[name])
    exact, own = exactly(tensors, mask), plainly(tensors, mask)
    bounds = [max(2 * rms(a, b), 5e-6) for a, b in zip(own, exact, strict=True)]
    available = [backend for backend, reason in reasons(tensors, mask).items() if reason is None]
    assert "triton" in available
    for backend in (*available, "auto"):
        results = run(tensors, mask, backend)
        assert torch.equal(results[1] == -torch.inf, exact[1] == -torch.inf), backend
        for what, ours, true, bound in zip(("out", "lse", "dq", "dk", "dv"), results, exact, bounds, strict=True):
            assert ours.dtype == (torch.float32 if what == "lse" else dtype)
            assert rms(ours, true) <= bound, f"{backend}: {what}"


@pytest.mark.parametrize(
    ("dtype", "groups", "head_dim"),
    [(torch.bfloat16, 1, 96), (torch.float16, 3, 20), (torch.bfloat16, 2, 256), (torch.float32, 1, 20)],
)
def test_other_head_dims(groups, head_dim, dtype):
    tensors = make(dtype, groups, head_dim)
    for name in ("causal", "documents, window"):
        mask = MASKS[name]
        exact, own = exactly(tensors, mask), plainly(tensors, mask)
        for backend in (b for b, reason in reasons(tensors, mask).items() if reason is None):
            for ours, true, plain in zip(run(tensors, mask, backend), exact, own, strict=True):
                assert rms(ours, true) <= max(2 * rms(plain, true), 5e-6), f"{backend}, {name}"


def test_the_checks_above_reject_a_window_off_by_one():
    tensors = make(torch.bfloat16, 1, 64)
    exact, own = exactly(tensors, MASKS["window"]), plainly(tensors, MASKS["window"])
    for backend in (b for b, reason in reasons(tensors, MASKS["window"]).items() if reason is None):
        results = run(tensors, Mask(window=39), backend)
        assert all(rms(a, b) > 2 * rms(c, b) for a, b, c in zip(results, exact, own, strict=True))


def test_fp64_runs_in_the_reference():
    tensors = make(torch.float64, 2, 64)
    assert "backend reference" in explain(*tensors[:2])
    for ours, exact in zip(run(tensors, Mask(window=40), "auto"), exactly(tensors, Mask(window=40)), strict=True):
        assert rms(ours, exact) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_small_window_over_a_long_sequence_is_one_launch(dtype):
    length, window, last = 16384, 64, 256
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, length, heads, 128).to("cuda", dtype) for heads in (8, 2, 2))
    form = choose("auto", where_of((q, k)), need_of(Mask(window=window), length, length)).form
    assert form in ("window", "any")
    out, lse = attention(q, k, v, Mask(window=window))
    keys = slice(length - last - window, length)
    mask = Mask(window=window, q_positions=torch.arange(window, window + last))
    exact, exact_lse = attention(q[:, -last:].double(), k[:, keys].double(), v[:, keys].double(), mask)
    assert rms(out[:, -last:], exact) < (5e-6 if dtype == torch.float32 else 1e-2)
    assert rms(lse[..., -last:], exact_lse) < (5e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("window", [None, 60])
def test_keys_in_four_parts_lose_no_more_than_at_once(dtype, fresh, window):
    """As the ranks of a ring compute it: queries over keys of other rows, merged in fp32, backward added up."""
    tensors = make(dtype, 4 if dtype == torch.bfloat16 else 2, 128)
    exact = exactly(tensors, Mask(window=window))
    q, k, v, grad_out = tensors
    parts = []
    for start in range(0, LENGTH, 50):
        spans = (Span(0, LENGTH, 0),), (Span(0, 50, start),)
        found = tiles(*spans, causal=True, window=window, documents=None)
        parts.append((slice(start, start + 50), found))
    names = [b for b, reason in reasons(tensors, Mask(window=window)).items() if reason is None and b != "cudnn"]
    for name in (*names, "auto"):
        options = {"scale": 128**-0.5, "backend": name}
        out, lse = torch.zeros(q.shape, device="cuda"), torch.full((2, 8, LENGTH), -torch.inf, device="cuda")
        for keys, found in parts:
            first = fresh and keys.start == 0
            attend_tiles(q, k[:, keys], v[:, keys], found, out=out, lse=lse, fresh=first, **options)
        grads = [torch.zeros(x.shape, device="cuda") for x in (q, k, v)]
        for keys, found in parts:
            sums = {"grad_q": grads[0], "grad_k": grads[1][:, keys], "grad_v": grads[2][:, keys]}
            attend_tiles_backward(grad_out, q, k[:, keys], v[:, keys], out, lse, found, **sums, **options)
        whole = run(tensors, Mask(window=window), name)
        for part, at_once, true in zip((out, lse, *grads), whole, exact, strict=True):
            assert rms(part.to(at_once.dtype), true) < 1.25 * rms(at_once, true) + 1e-6, name


def test_repeated_runs_are_equal_where_torch_is_told_so(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        tensors = make(torch.bfloat16, 4, 128)
        for backend in (b for b, reason in reasons(tensors, Mask()).items() if reason is None):
            first, second = run(tensors, Mask(), backend), run(tensors, Mask(), backend)
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), backend
    finally:
        torch.use_deterministic_algorithms(False)
