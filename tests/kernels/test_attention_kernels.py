"""The fused attention kernels against plain attention in fp64: output, lse, gradients, and which blocks are visited."""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hydra_dist.attention import Mask, reference
from hydra_dist.kernels import attention_launch
from hydra_dist.kernels.attention_backward import backward
from hydra_dist.kernels.attention_forward import forward
from hydra_dist.kernels.attention_launch import Tile, refuses

SCALE = 0.3
SMALL = Tile(16, 16, 4, 1)


@dataclass(frozen=True)
class Case:
    """One combination; over all of them, each value of a column meets most values of the others."""

    mask: Mask
    heads: tuple[int, int] = (2, 1)
    head_dim: int = 16
    lengths: tuple[int, int] = (48, 48)
    batch_size: int = 1
    tile: Tile = SMALL
    scan: int = 256
    """Blocks looked at together: few, so that runs of blocks are cut in small tests too."""

    @property
    def mask_arguments(self) -> dict:
        mask = self.mask
        names = ("causal", "window", "q_positions", "k_positions", "document_starts", "k_document_starts")
        return {name: getattr(mask, name) for name in names}

    def allowed(self) -> Tensor:
        return self.mask.allowed(*self.lengths)


def packed(*lengths: int) -> Tensor:
    """[1, S]: the document start of each row, for documents of such lengths."""
    return torch.tensor([0, *lengths[:-1]]).cumsum(0).repeat_interleave(torch.tensor(lengths)).unsqueeze(0)


def zigzag(rank: int, ranks: int, chunk: int) -> Tensor:
    """The positions of one rank: its chunk counted from the front and its chunk counted from the back."""
    rows = torch.arange(chunk)
    return torch.cat([rows + rank * chunk, rows + (2 * ranks - 1 - rank) * chunk])


def shards(rank: int, key_rank: int, ranks: int, chunk: int, starts: Tensor | None = None, **rest) -> Mask:
    """The mask of one rank's queries and another's keys."""
    q, k = zigzag(rank, ranks, chunk), zigzag(key_rank, ranks, chunk)
    documents = {} if starts is None else {"document_starts": starts[:, q], "k_document_starts": starts[:, k]}
    return Mask(q_positions=q, k_positions=k, **documents, **rest)


DOCUMENTS = packed(1, 20, 1, 1, 17, 8)
CASES = {
    "causal": Case(Mask(), (4, 2), 24, (50, 50)),
    "causal, runs cut": Case(Mask(), (1, 1), 16, (70, 70), 1, scan=2),
    "full": Case(Mask(causal=False), (3, 1), 16, (40, 56)),
    "full, more queries": Case(Mask(causal=False), (2, 2), 64, (40, 17), 1, Tile(16, 32, 4, 1), 2),
    "causal, fewer keys": Case(Mask(), (1, 1), 16, (40, 25), 2, Tile(32, 16, 4, 1)),
    "window 1": Case(Mask(window=1), (2, 1), 24, (41, 41)),
    "window 20": Case(Mask(window=20), (3, 1), 16, (70, 70), scan=4),
    "window 20, wide keys": Case(Mask(window=20), (2, 1), 64, (65, 65), 1, Tile(16, 32, 4, 1)),
    "window beyond all": Case(Mask(window=10**10), (4, 1), 16, (40, 40)),
    "documents": Case(Mask(document_starts=DOCUMENTS), (4, 1), 24),
    "documents, full": Case(Mask(causal=False, document_starts=DOCUMENTS), (4, 2), 16, scan=2),
    "documents, window": Case(Mask(window=3, document_starts=DOCUMENTS), (3, 3), 64, tile=Tile(32, 16, 4, 1)),
    "documents per batch row": Case(
        Mask(document_starts=torch.cat([DOCUMENTS, packed(16, 31, 1)])), (2, 1), 16, batch_size=2
    ),
    "zigzag, own keys": Case(shards(0, 0, 2, 24), (4, 2), 16),
    "zigzag, later rank's keys": Case(shards(0, 1, 2, 20), (2, 1), 24, (40, 40), 2),
    "zigzag, earlier rank's keys": Case(shards(2, 0, 3, 16), (3, 3), 16, (32, 32)),
    "zigzag, window": Case(shards(1, 2, 3, 20, window=25), (2, 1), 64, (40, 40), scan=2),
    "zigzag, documents": Case(shards(1, 0, 2, 12, DOCUMENTS), (8, 1), 16, (24, 24)),
    "gathered keys of three ranks": Case(
        Mask(q_positions=zigzag(1, 3, 16), k_positions=torch.cat([zigzag(r, 3, 16) for r in range(3)])),
        (2, 1),
        16,
        (32, 96),
        scan=4,
    ),
    "keys all later": Case(Mask(k_positions=torch.arange(100, 140)), (2, 1), 16, (20, 40)),
    "one row": Case(Mask(), (2, 2), 16, (1, 1), 2),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request, monkeypatch) -> Case:
    monkeypatch.setattr(attention_launch, "SCAN", request.param.scan)
    return request.param


def inputs(case: Case, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v and the gradient of out, stored heads first, so that rows are not side by side."""
    made = []
    for length, heads in zip((*case.lengths, case.lengths[1], case.lengths[0]), (0, 1, 1, 0), strict=True):
        shape = case.batch_size, case.heads[heads], length, case.head_dim
        made.append(torch.randn(shape).to(device, dtype).transpose(1, 2))
    return made


def truth(case: Case, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> list[Tensor]:
    """out, lse and the three gradients in fp64."""
    wide = [x.double().cpu() for x in (q, k, v)]
    out, lse = reference.forward(*wide, case.allowed(), SCALE)
    return [out, lse, *reference.backward(grad_out.double().cpu(), *wide, out, lse, case.allowed(), SCALE)]


def difference(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|, or max|a - b| where b is zero but for rounding."""
    a, b = a.double().cpu(), b.double()
    assert a.shape == b.shape
    assert torch.equal(a == -torch.inf, b == -torch.inf)
    a, b = a.masked_fill(a == -torch.inf, 0.0), b.masked_fill(b == -torch.inf, 0.0)
    assert bool(torch.isfinite(a).all())
    if b.numel() == 0:
        return 0.0
    largest = b.abs().max().item()
    return (a - b).abs().max().item() / (largest if largest > 1e-6 else 1.0)


def run_forward(case: Case, q: Tensor, k: Tensor, v: Tensor, **changes) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, **{"scale": SCALE, "tile": case.tile, **case.mask_arguments, **changes})


def run_backward(case: Case, grad_out, q, k, v, out, lse, **changes) -> tuple[Tensor, Tensor, Tensor]:
    arguments = {"scale": SCALE, "tile": case.tile, **case.mask_arguments, **changes}
    return backward(grad_out, q, k, v, out, lse, **arguments)


def least_visits(case: Case) -> Tensor:
    """bool [B or 1, query blocks, key blocks]: which blocks have a pair that the mask allows."""
    rows = case.allowed().split(case.tile.queries, dim=1)
    return torch.stack([torch.stack([b.any(1).any(1) for b in r.split(case.tile.keys, dim=2)], 1) for r in rows], 1)


def overlaps(case: Case) -> Tensor:
    """The same of blocks whose bounds overlap: whose least and greatest positions and starts leave a pair possible."""
    mask, (q_length, k_length) = case.mask, case.lengths
    q_position = torch.arange(q_length) if mask.q_positions is None else mask.q_positions
    k_position = torch.arange(k_length) if mask.k_positions is None else mask.k_positions
    q_starts = torch.zeros(1, q_length, dtype=torch.long) if mask.document_starts is None else mask.document_starts
    k_starts = q_starts if mask.k_document_starts is None else mask.k_document_starts
    k_starts = torch.zeros(1, k_length, dtype=torch.long) if mask.document_starts is None else k_starts

    def bounds(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
        parts = values.split(size, dim=-1)
        return torch.stack([x.amin(-1) for x in parts], -1), torch.stack([x.amax(-1) for x in parts], -1)

    (q_low, q_high), (k_low, k_high) = bounds(q_position, case.tile.queries), bounds(k_position, case.tile.keys)
    (first, last), (k_first, k_last) = bounds(q_starts, case.tile.queries), bounds(k_starts, case.tile.keys)
    some = (first[:, :, None] <= k_last[:, None]) & (k_first[:, None] <= last[:, :, None])
    if mask.causal or mask.window is not None:
        some = some & (q_high[:, None] >= k_low)
    if mask.window is not None:
        some = some & (q_low[:, None] - k_high < mask.window)
    return some


def test_fp32_equals_plain_attention_and_only_blocks_that_a_mask_leaves_are_visited(case, device):
    q, k, v, grad_out = inputs(case, device)
    out, lse, *grads = truth(case, q, k, v, grad_out)
    some = overlaps(case).expand(case.batch_size, -1, -1)
    heads, key_heads = case.heads
    of_queries = torch.full((case.batch_size, heads, some.shape[1]), -1, dtype=torch.int32, device=device)
    found_out, found_lse = run_forward(case, q, k, v, visits=of_queries)
    assert difference(found_out, out) <= 1e-6
    assert difference(found_lse, lse) <= 1e-6
    by_queries = some.sum(2)[:, None].expand(-1, heads, -1)
    assert torch.equal(of_queries.long().cpu(), by_queries)

    of_keys = torch.full((case.batch_size, key_heads, some.shape[2]), -1, dtype=torch.int32, device=device)
    visits = of_keys, of_queries.fill_(-1)
    found = run_backward(case, grad_out, q, k, v, found_out, found_lse, visits=visits)
    assert [name for name, a, b in zip("qkv", found, grads, strict=True) if difference(a, b) > 5e-6] == []
    assert torch.equal(of_queries.long().cpu(), by_queries)
    by_keys = some.sum(1)[:, None].expand(-1, key_heads, -1)
    assert torch.equal(of_keys.long().cpu(), by_keys * (heads // key_heads))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bounds_leave_out_every_empty_block_of_rows_that_are_one_run(case):
    needed, some = least_visits(case), overlaps(case)
    assert bool((needed <= some).all())
    if case.mask.q_positions is None and case.mask.k_positions is None:
        assert torch.equal(needed, some)


def test_the_count_of_blocks_sees_blocks_visited_without_need(device):
    case = CASES["window 20"]
    q, k, v, _ = inputs(case, device)
    needed = overlaps(case).sum(2)[:, None].expand(1, 3, -1)
    assert needed.sum() < 0.6 * 3 * overlaps(case).numel()
    visits = torch.zeros(1, 3, needed.shape[2], dtype=torch.int32, device=device)
    run_forward(case, q, k, v, window=40, visits=visits)
    assert bool((visits.cpu() > needed).any())


@pytest.mark.parametrize("name", ["causal", "window 20, wide keys", "documents, full", "zigzag, documents"])
def test_half_precision_loses_at_most_twice_what_plain_attention_loses(name, device, half_dtypes):
    case = CASES[name]
    for dtype in half_dtypes:
        q, k, v, grad_out = inputs(case, device, dtype)
        out, _, *grads = truth(case, q, k, v, grad_out)
        own = [x.detach().requires_grad_() for x in (q, k, v)]
        plain = _plain(*own, case.allowed().to(device))
        plain.backward(grad_out)
        found_out, found_lse = run_forward(case, q, k, v)
        assert found_out.dtype == dtype
        wide_out, _ = run_forward(case, q, k, v, out_dtype=torch.float32)
        assert wide_out.dtype == torch.float32
        found = run_backward(case, grad_out, q, k, v, wide_out, found_lse)
        assert {x.dtype for x in found} == {torch.float32}
        for a, b, low in zip((found_out, wide_out, *found), (out, out, *grads), (plain, plain, *own), strict=True):
            limit = difference(low.detach() if low is plain else low.grad, b)
            assert 0 < difference(a, b) <= 2 * limit


def _plain(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Attention in the inputs' own precision from PyTorch's products and softmax."""
    k, v = (reference.repeat_groups(x, q.shape[2]) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
    scores = scores.masked_fill(~allowed.unsqueeze(1), -torch.inf)
    p = scores.softmax(-1).masked_fill(~allowed.any(-1)[:, None, :, None], 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", p, v)


def test_shards_of_keys_add_up_to_the_whole(device):
    """Three ranks' keys, one after the other into one result; gradients of each shard from the final out and lse."""
    ranks, chunk = 3, 14
    case = Case(Mask(document_starts=packed(30, 1, 53)), (4, 2), 16, (2 * ranks * chunk,) * 2, 2)
    q, k, v, grad_out = inputs(case, device)
    whole_out, whole_lse, *whole = truth(case, q, k, v, grad_out)
    mine = zigzag(1, ranks, chunk)
    out = torch.zeros(2, 2 * chunk, 4, 16, device=device)
    lse = torch.full((2, 4, 2 * chunk), -torch.inf, device=device)
    masks = [shards(1, other, ranks, chunk, case.mask.document_starts) for other in range(ranks)]
    keys = [zigzag(other, ranks, chunk) for other in range(ranks)]
    for mask, rows in zip(masks, keys, strict=True):
        part = Case(mask, tile=case.tile)
        same = run_forward(part, q[:, mine], k[:, rows], v[:, rows], accumulate=(out, lse))
        assert same[0] is out
        assert same[1] is lse
    assert difference(out, whole_out[:, mine]) <= 1e-6
    assert difference(lse, whole_lse[:, :, mine]) <= 1e-6
    grad_q = torch.zeros_like(q[:, mine])
    only_mine = [x.clone() for x in (whole_out, whole_lse)]
    others = torch.ones(2 * ranks * chunk, dtype=torch.bool)
    others[mine] = False
    grad_of_mine = grad_out.double().cpu() * ~others[None, :, None, None]
    wide = [x.double().cpu() for x in (q, k, v)]
    _, expected_k, expected_v = reference.backward(grad_of_mine, *wide, *only_mine, case.allowed(), SCALE)
    for mask, rows in zip(masks, keys, strict=True):
        part = Case(mask, tile=case.tile)
        grads = run_backward(part, grad_out[:, mine], q[:, mine], k[:, rows], v[:, rows], out, lse)
        grad_q += grads[0]
        assert difference(grads[1], expected_k[:, rows]) <= 5e-6
        assert difference(grads[2], expected_v[:, rows]) <= 5e-6
    assert difference(grad_q, whole[0][:, mine]) <= 5e-6


def test_every_element_is_written_and_equal_inputs_give_equal_bits(device, monkeypatch):
    case = CASES["zigzag, later rank's keys"]  # half of the queries see no key
    q, k, v, grad_out = inputs(case, device)
    empty = torch.empty

    def poisoned(*shape, **rest):
        made = empty(*shape, **rest)
        return made.fill_(torch.nan if made.is_floating_point() else -7)

    results = []
    for _ in range(2):
        out, lse = run_forward(case, q, k, v)
        results.append([out, lse, *run_backward(case, grad_out, q, k, v, out, lse)])
        monkeypatch.setattr(torch, "empty", poisoned)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert bool((lse == -torch.inf).any())
    assert not bool(results[1][0].isnan().any())


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_any_scale(scale, device):
    case = CASES["zigzag, own keys"]
    q, k, v, grad_out = inputs(case, device)
    wide = [x.double().cpu() for x in (q, k, v)]
    out, lse = reference.forward(*wide, case.allowed(), scale)
    grads = reference.backward(grad_out.double().cpu(), *wide, out, lse, case.allowed(), scale)
    found, found_lse = run_forward(case, q, k, v, scale=scale)
    assert difference(found, out) <= 1e-6
    for a, b in zip(run_backward(case, grad_out, q, k, v, found, found_lse, scale=scale), grads, strict=True):
        assert difference(a, b) <= 5e-6


def test_the_tables_tiles_and_gradients_in_the_dtype_that_is_asked_for(device):
    case = CASES["one row"]
    q, k, v, grad_out = inputs(case, device, torch.float16)
    expected, _, *grads = truth(case, q, k, v, grad_out)
    out, lse = run_forward(case, q, k, v, tile=None)
    assert difference(out, expected) <= 1e-3
    found = run_backward(case, grad_out, q, k, v, out, lse, tile=None, grad_dtype=torch.float16)
    assert {x.dtype for x in found} == {torch.float16}
    assert difference(found[2], grads[2]) <= 1e-3


def test_no_keys_and_no_queries(device):
    q, k = torch.randn(1, 5, 2, 16, device=device), torch.randn(1, 0, 1, 16, device=device)
    out, lse = forward(q, k, k, scale=1.0, causal=True)
    assert torch.equal(out, torch.zeros_like(q))
    assert bool((lse == -torch.inf).all())
    assert torch.equal(backward(q, q, k, k, out, lse, scale=1.0, causal=True)[0], torch.zeros_like(q))
    running = torch.ones_like(q), torch.ones(1, 2, 5, device=device)
    forward(q, k, k, scale=1.0, causal=True, accumulate=running)
    assert bool((running[0] == 1).all())
    assert forward(q[:, :0], q, q, scale=1.0, causal=True)[0].shape == (1, 0, 2, 16)


WRONG_FORWARD = {
    "window one too wide": ("window 20", {"window": 21}),
    "window one too narrow": ("window 20", {"window": 19}),
    "documents ignored": ("documents", {"document_starts": None}),
    "positions ignored": ("zigzag, earlier rank's keys", {"q_positions": None, "k_positions": None}),
    "not causal": ("causal", {"causal": False}),
    "scale off by a thousandth": ("full", {"scale": SCALE * 1.001}),
}


@pytest.mark.parametrize(("name", "changes"), WRONG_FORWARD.values(), ids=WRONG_FORWARD.keys())
def test_the_comparison_rejects_a_wrong_mask(name, changes, device):
    case = CASES[name]
    q, k, v, grad_out = inputs(case, device)
    out, lse, *grads = truth(case, q, k, v, grad_out)
    assert difference(run_forward(case, q, k, v, **changes)[0], out) > 1e-4
    right = out.float().to(device), lse.float().to(device)
    found = run_backward(case, grad_out, q, k, v, *right, **changes)
    assert max(difference(a, b) for a, b in zip(found, grads, strict=True)) > 1e-4


def test_the_comparison_rejects_gradients_without_delta_and_swapped_heads(device):
    case = CASES["causal"]
    q, k, v, grad_out = inputs(case, device)
    out, lse, grad_q, grad_k, _ = truth(case, q, k, v, grad_out)
    right = out.float().to(device), lse.float().to(device)
    found = run_backward(case, grad_out, q, k, v, torch.zeros_like(right[0]), right[1])
    assert difference(found[0], grad_q) > 1e-2
    assert difference(found[1], grad_k) > 1e-2
    assert difference(run_forward(case, q, k.flip(2), v.flip(2))[0], out) > 1e-2


def test_what_the_kernels_cannot_take_is_refused(device):
    x = torch.randn(1, 4, 2, 16, device=device)
    with pytest.raises(ValueError, match=r"fp32, fp16 and bf16, and not torch.float64"):
        forward(x.double(), x.double(), x.double(), scale=1.0, causal=True)
    for dtype, largest in ((torch.float16, 256), (torch.float32, 128)):
        wide = torch.randn(1, 4, 2, largest + 2, device=device, dtype=dtype)
        with pytest.raises(ValueError, match=f"up to {largest} in {dtype}, and this is {largest + 2}"):
            forward(wide, wide, wide, scale=1.0, causal=True)
    with pytest.raises(ValueError, match="Hk a divisor of Hq"):
        forward(x.repeat(1, 1, 3, 1), *[x.repeat(1, 1, 2, 1)] * 2, scale=1.0, causal=True)
    with pytest.raises(ValueError, match=r"k is torch.float16 .* and q is torch.float32"):
        forward(x, x.half(), x, scale=1.0, causal=True)
    with pytest.raises(ValueError, match=r"accumulate: lse is torch.float64"):
        forward(x, x, x, scale=1.0, causal=True, accumulate=(x, torch.zeros(1, 2, 4, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"lse is torch.float32 \[1, 4, 2\]; fp32 of shape \[1, 2, 4\]"):
        backward(x, x, x, x, x, torch.zeros(1, 4, 2, device=device), scale=1.0, causal=True)
    if device.type == "cpu":
        assert "multiplies bf16 wrongly" in str(refuses(device, torch.bfloat16, 64))


def test_a_cpu_without_the_interpreter_is_refused():
    program = "import torch, hydra_dist.kernels.attention_launch as a; "
    program += (
        "print(a.refuses(torch.device('cpu'), torch.float32, 64), a.refuses(torch.device('cuda'), torch.half, 8))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert "Triton compiles for GPUs, and this is cpu" in done.stdout
    assert done.stdout.split()[-1] == "None"
