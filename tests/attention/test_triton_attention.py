"""The wiring of this package's Triton kernels: whole masks and tiles, by Triton's interpreter in its own process."""

import sys

import pytest
import torch

from hydra_dist.attention import Mask, triton_attention
from hydra_dist.attention.band import Band
from hydra_dist.attention.launch import Launch

PROGRAM = """
import torch
from hydra_dist.attention import Mask, attend_tiles, attend_tiles_backward, attention
from hydra_dist.costs.tiles import Span, tiles

torch.manual_seed(0)
LENGTH = 40
q, k, v, grad_out = (torch.randn(1, LENGTH, heads, 16) for heads in (2, 1, 1, 2))
starts = torch.tensor([0, 1, 30]).repeat_interleave(torch.tensor([1, 29, 10]))[None]
order = torch.cat([torch.arange(10), torch.arange(30, 60)])


def run(mask, backend):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, mask, scale=0.3, backend=backend)
    return out, lse, *torch.autograd.grad(out, leaves, grad_out)


def report(name, found, expected):
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a == -torch.inf, b == -torch.inf), name
        a, b = (x.masked_fill(x == -torch.inf, 0.0) for x in (a, b))
        worst = max(worst, ((a - b).abs().max() / b.abs().max()).item())
    print(name, worst)


MASKS = {
    "causal": Mask(),
    "window": Mask(window=7),
    "documents": Mask(document_starts=starts),
    "positions": Mask(window=12, q_positions=order, k_positions=torch.arange(LENGTH)),
}
for name, mask in MASKS.items():
    report(name, run(mask, "triton"), run(mask, "reference"))
report("wrong", run(Mask(window=8), "triton"), run(Mask(window=7), "reference"))

for window in (None, 30):
    found = tiles((Span(0, 40, 20),), (Span(0, 40, 0),), causal=True, window=window, documents=None)
    results = []
    for backend in ("triton", "reference"):
        out, lse = torch.zeros(q.shape), torch.full((1, 2, LENGTH), -torch.inf)
        attend_tiles(q, k, v, found, scale=0.3, out=out, lse=lse, backend=backend)
        grads = [torch.zeros(x.shape) for x in (q, k, v)]
        sums = dict(zip(("grad_q", "grad_k", "grad_v"), grads))
        options = {"scale": 0.3, "backend": backend}
        attend_tiles_backward(grad_out, q, k, v, out, lse, found, **sums, **options)
        results.append((out, lse, *grads))
    report("-".join(sorted({tile.kind for tile in found})), *results)
"""


def test_whole_masks_and_tiles(run_command):
    done = run_command([sys.executable, "-c", PROGRAM], env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    worst = {name: float(value) for name, value in map(str.split, done.stdout.splitlines())}
    assert worst.pop("wrong") > 1e-2
    assert set(worst) == {"causal", "window", "documents", "positions", "causal-full", "masked"}
    assert max(worst.values()) < 1e-5, worst


def test_on_the_cpu_it_is_for_tests(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "interpreter" in triton_attention.refuses(torch.device("cpu"), torch.float32, 16, "any")
    assert "meta" in triton_attention.refuses(torch.device("meta"), torch.float32, 16, "any")


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "hydra_dist.kernels", None)
    reason = triton_attention.refuses(torch.device("cuda"), torch.float32, 16, "any")
    assert "triton cannot be imported" in reason


@pytest.mark.parametrize("band", [None, Band(6, 9, 3, 2)])
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_as_masks(band, causal):
    """A tile's rectangle and a mask with its positions are the same pairs."""
    if band is not None and causal:
        return
    q_length, k_length = (6, 6) if causal else (6, 9)
    q = torch.empty(1, q_length, 1, 8)
    arguments = triton_attention._mask(q, Launch(1.0, causal, band))
    expected = band or (Band(6, 6, 0, None) if causal else None)
    allowed = Mask(**arguments).allowed(q_length, k_length)[0]
    assert torch.equal(allowed, torch.ones(6, 9).bool() if expected is None else expected.allowed("cpu"))
