"""The prologue's kernels against the formulas under autograd in fp64, and against plain PyTorch as precise as they."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from hydra_dist.kernels import (
    ccgqa_prologue_backward,
    ccgqa_prologue_convolutions,
    ccgqa_prologue_forward,
    ccgqa_prologue_norm,
    ccgqa_prologue_workspace,
)
from hydra_dist.model import prologue_plain
from hydra_dist.model.prologue_plain import Switches, Taps

GRADIENTS = ("p", "z_before", "v_before", "w0", "b0", "w1", "b1", "beta")
SMALL = (
    ccgqa_prologue_forward.Tiling(rows=16, channels=16, num_warps=4, programs=1),
    ccgqa_prologue_workspace.Tiling(
        norm_rows=16, rows=16, channels=16, num_warps=4, num_stages=1, programs=1, dy_bytes=1
    ),
)


@dataclass(frozen=True)
class Case:
    """One combination of what a layer may be and what its rows may be."""

    heads: tuple[int, int] = (2, 1)
    head_dim: int = 16
    half: int = 4
    taps: tuple[int, int] | None = (2, 2)
    mean: bool = True
    norm: bool = True
    shift: bool = True
    beta: bool = True
    chunks: tuple[int, ...] = (24,)
    before: bool = False
    documents: tuple[tuple[int, ...], ...] = ()
    """First positions of documents in each batch row, counted from the first local row; None begin without any."""
    batch_size: int = 1

    @property
    def switches(self) -> Switches:
        return Switches(
            *self.heads, self.head_dim, self.taps or (1, 1), self.mean, 1e-5 if self.norm else None, self.shift
        )

    def inputs(self) -> dict[str, Tensor | None]:
        """In fp64."""
        (hq, hk), D, B, S = self.heads, self.head_dim, self.batch_size, sum(self.chunks)
        C, k0, k1 = (hq + hk) * D, *self.switches.kernel_sizes

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64)

        x: dict[str, Tensor | None] = dict.fromkeys(("z_before", "v_before", "ages", "w0", "b0", "w1", "b1", "beta"))
        x["p"] = normal(B, S, C + hk * D)
        if self.taps:
            x |= {"w0": normal(C, k0), "b0": normal(C), "b1": normal(hq + hk, D)}
            x["w1"] = normal(hq + hk, k1 * D, D) / (k1 * D) ** 0.5
        if self.beta:
            x["beta"] = torch.rand(hk, dtype=torch.float64) + 0.5
        if self.before:
            x["z_before"] = normal(B, len(self.chunks), k0 + k1 - 2, C)
            x["v_before"] = normal(B, len(self.chunks), 1, hk * D // 2) if self.shift else None
        if self.documents:
            x["ages"] = torch.stack([ages(S, starts) for starts in self.documents])
        angles = normal(S, 1, self.half) * 3
        x["cos"], x["sin"] = (angles.cos(), angles.sin()) if self.half else (None, None)
        return x


def ages(length: int, starts: tuple[int, ...]) -> Tensor:
    """[S]: how far each row is behind the last of ``starts`` (the first may be negative: it began before the rows)."""
    rows = torch.arange(length)
    return rows - torch.tensor([max(start for start in starts if start <= row) for row in range(length)])


def chain(case: Case, x: dict[str, Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas of arXiv 2510.04476 tap by tap, under autograd."""
    (hq, hk), D, p = case.heads, case.head_dim, x["p"]
    C, (k0, k1) = (hq + hk) * D, case.switches.kernel_sizes
    latent = p[..., :C].unflatten(-1, (-1, D))
    y = latent
    if case.taps:
        y = x["b1"].expand_as(latent)
        w0, w1 = x["w0"].unflatten(0, (-1, D)), x["w1"].unflatten(1, (k1, D))
        for d in range(k1):
            u = x["b0"].unflatten(0, (-1, D)).expand_as(latent)
            for i in range(k0):
                u = u + w0[..., k0 - 1 - i] * delayed(p[..., :C], x["z_before"], d + i, case, x).unflatten(-1, (-1, D))
            y = y + torch.einsum("bshi,hio->bsho", u, w1[:, k1 - 1 - d])
    q, k = y.split((hq, hk), dim=2)
    if case.mean:
        z_q, z_k = latent[:, :, :hq].unflatten(2, (hk, -1)), latent[:, :, hq:].unsqueeze(3)
        mean = (z_q + z_k) / 2
        q, k = q + mean.flatten(2, 3), k + mean.mean(3)
    if case.norm:
        q, k = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + case.switches.eps) for y in (q, k))
        k = k * x["beta"].unsqueeze(-1) if case.beta else k
    if case.half:
        q, k = (turned(y, x["cos"], x["sin"]) for y in (q, k))
    v = p[..., C:]
    if case.shift:
        first, second = v.chunk(2, dim=-1)
        v = torch.cat([first, delayed(second, x["v_before"], 1, case, x)], dim=-1)
    return q, k, v.unflatten(-1, (hk, D))


def delayed(rows: Tensor, before: Tensor | None, delay: int, case: Case, x: dict[str, Tensor | None]) -> Tensor:
    """Rows ``delay`` earlier in their chunk, from ``before`` where the chunk begins, zero outside of the document."""
    chunks = []
    for index, chunk in enumerate(rows.split(case.chunks, dim=1)):
        width = delay if before is None else before.shape[2]
        lead = rows.new_zeros(len(rows), width, rows.shape[2]) if before is None else before[:, index]
        chunks.append(torch.cat([lead, chunk], dim=1)[:, width - delay :][:, : chunk.shape[1]])
    result = torch.cat(chunks, dim=1)
    return result if x["ages"] is None else result * (x["ages"] >= delay).unsqueeze(-1)


def turned(y: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    half = cosines.shape[-1]
    a, b, rest = y[..., :half], y[..., half : 2 * half], y[..., 2 * half :]
    return torch.cat([a * cosines - b * sines, b * cosines + a * sines, rest], dim=-1)


def expected(case: Case, x: dict[str, Tensor | None]) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """Outputs, gradients of these (chosen at random), and gradients of the inputs, in fp64."""
    x = {name: value.clone().requires_grad_() if name in GRADIENTS and value is not None else value
         for name, value in x.items()}  # fmt: skip
    outputs = chain(case, x)
    grads = [torch.randn_like(out) for out in outputs]
    wanted = [x[name] for name in GRADIENTS if x[name] is not None]
    found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
    results = [None if x[name] is None else next(found) for name in GRADIENTS]
    return [out.detach() for out in outputs], grads, results


def kernels(case: Case, x, grads, dtype=torch.float32, tilings=SMALL, device="cpu") -> tuple[list, list]:
    """What the kernels make of it: outputs and gradients."""
    wide = ("w0", "b0", "w1", "b1", "beta", "cos", "sin")
    x = {name: None if value is None else value.to(device) for name, value in x.items()}
    x = {name: value if value is None or name == "ages" else value.to(torch.float32 if name in wide else dtype)
         for name, value in x.items()}  # fmt: skip
    rows = (x["p"], x["z_before"], x["v_before"], x["ages"], case.chunks)
    rest = tuple(x[name] for name in ("beta", "cos", "sin"))
    settings = vars(case.switches)
    out = ccgqa_prologue_forward.forward(
        *rows, x["w0"], x["b0"], x["w1"], x["b1"], *rest, **settings, tiling=tilings[0]
    )
    q, k, _, inv = out
    grads = [grad.to(device, dtype) for grad in grads]
    results = ccgqa_prologue_backward.backward(
        *grads, q, k, inv, *rows, x["w0"], x["b0"], x["w1"], *rest, **settings, tiling=tilings[1]
    )
    return list(out[:3]), list(results)


def difference(a: Tensor | None, b: Tensor | None) -> float:
    """max|a - b| / max|b|; NaN and a missing tensor count as infinite."""
    if a is None or b is None:
        return 0.0 if a is b else torch.inf
    if not b.numel():
        return 0.0 if a.shape == b.shape else torch.inf
    assert a.shape == b.shape
    largest = b.abs().max().item()
    error = (a.double().cpu() - b.double()).abs().max().item() / (largest if largest > 1e-6 else 1.0)
    return error if error == error else torch.inf


BARE = {"taps": None, "mean": False, "norm": False, "shift": False, "half": 0, "beta": False}
CASES = {
    "as usual": Case(heads=(4, 2), chunks=(40,)),
    "rows before": Case(heads=(4, 1), before=True),
    "two chunks": Case(before=True, chunks=(23, 14)),
    "a chunk shorter than the taps reach": Case(before=True, chunks=(2, 17), taps=(3, 3), heads=(1, 1)),
    "two chunks, nothing before them": Case(chunks=(9, 20), heads=(2, 2)),
    "documents": Case(documents=((0, 1, 2, 9, 16, 17),)),
    "documents, rows before": Case(documents=((-1, 5, 6, 20, 22), (-30, 21)), batch_size=2, before=True,
                                   chunks=(19, 10), taps=(3, 2), half=8),
    "a document begins with the second chunk": Case(documents=((-4, 16),), before=True, chunks=(16, 9), heads=(1, 1)),
    "taps 1 1": Case(taps=(1, 1), before=True, chunks=(20,)),
    "taps 1 4": Case(taps=(1, 4), before=True, chunks=(20,), heads=(1, 1)),
    "taps 4 1": Case(taps=(4, 1), heads=(1, 1), documents=((0, 11, 13),), chunks=(20,)),
    "taps 4 3": Case(taps=(4, 3), before=True),
    "groups of 8": Case(heads=(8, 1), chunks=(17,)),
    "odd key heads": Case(heads=(3, 3), half=0, chunks=(33,)),
    "head_dim 24": Case(head_dim=24, half=6, chunks=(20,)),
    "head_dim 32, all turned": Case(head_dim=32, half=16, chunks=(20,), documents=((0, 3),)),
    "head_dim 80": Case(head_dim=80, half=10, heads=(1, 1), chunks=(20,)),
    "head_dim 64": Case(head_dim=64, half=2, heads=(1, 1), chunks=(20,)),
    "no convolutions": Case(taps=None),
    "no mean": Case(mean=False),
    "no norm": Case(norm=False),
    "no norm, no beta": Case(norm=False, beta=False),
    "norm without beta": Case(beta=False),
    "no value shift": Case(shift=False, before=True),
    "convolutions alone": Case(**BARE | {"taps": (2, 2)}),
    "mean alone": Case(**BARE | {"mean": True}),
    "norm alone": Case(**BARE | {"norm": True, "beta": True}),
    "nothing": Case(**BARE, head_dim=24),
    "three batch rows": Case(batch_size=3, heads=(1, 1), chunks=(7, 10), before=True),
}  # fmt: skip


@pytest.fixture(autouse=True)
def unwritten_is_nan():
    """Memory that no kernel writes holds NaN, which no comparison here lets pass."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("name", CASES)
def test_fp32(name, device):
    case = CASES[name]
    x = case.inputs()
    outputs, grads, results = expected(case, x)
    ours, our_results = kernels(case, x, grads, device=device)
    for ours_out, out in zip(ours, outputs, strict=True):
        assert difference(ours_out, out) < 1e-5
    for wanted, ours_grad, grad in zip(GRADIENTS, our_results, results, strict=True):
        if wanted == "beta" and not case.norm and case.beta:
            assert not ours_grad.any()
        else:
            assert difference(ours_grad, grad) < 1e-5, wanted


def worst(case: Case, wrong: Case, wrong_x: dict[str, Tensor | None], right: tuple, device) -> tuple[float, float]:
    """The largest difference of outputs and of gradients that a wrong variant makes."""
    outputs, grads, results = right
    ours, our_results = kernels(wrong, wrong_x, grads, device=device)
    pairs = [(a, b) for a, b in zip(our_results, results, strict=True) if a is not None and b is not None]
    return max(map(difference, ours, outputs)), max(difference(a, b) for a, b in pairs)


WRONG = {
    "ages ignored": ("documents", lambda case, x: (case, x | {"ages": None})),
    "ages one too high": ("documents", lambda case, x: (case, x | {"ages": x["ages"] + 1})),
    "chunks run into each other": ("two chunks, nothing before them", lambda c, x: (replace(c, chunks=(29,)), x)),
    "rows before ignored": ("two chunks", lambda case, x: (case, x | {"z_before": None, "v_before": None})),
    "rows before in the wrong order": ("rows before", lambda case, x: (case, x | {"z_before": x["z_before"].flip(2)})),
    "first tap as last": ("as usual", lambda case, x: (case, x | {"w0": x["w0"].flip(1)})),
    "turned the other way": ("as usual", lambda case, x: (case, x | {"sin": -x["sin"]})),
    "no mean": ("as usual", lambda case, x: (replace(case, mean=False), x)),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_check_above_rejects(name, device):
    of, change = WRONG[name]
    case = CASES[of]
    x = case.inputs()
    outputs, gradients = worst(case, *change(case, x), expected(case, x), device)
    assert min(outputs, gradients) > 1e-2


def test_nothing_is_left_unwritten_and_that_would_be_seen(device, monkeypatch):
    case = Case(before=True, chunks=(20,))
    x = case.inputs()
    _, grads, _ = expected(case, x)
    outputs, results = kernels(case, x, grads, device=device)
    assert all(torch.isfinite(value).all() for value in [*outputs, *results])
    monkeypatch.setattr(ccgqa_prologue_convolutions, "launch", lambda workspace, rows: None)
    _, results = kernels(case, x, grads, device=device)
    assert not any(torch.isfinite(results[GRADIENTS.index(name)]).all() for name in ("p", "w0", "w1"))


@pytest.mark.parametrize(
    "case",
    [Case(before=True, chunks=(15, 10), heads=(4, 1), head_dim=32), Case(documents=((0, 7, 8),), taps=(4, 3))],
)
def test_half_precision_loses_at_most_twice_what_plain_pytorch_loses(case, half_dtypes, device):
    """Both get the same rounded inputs; the error is that of the root mean square, over two draws."""
    for dtype in half_dtypes:
        errors: dict[str, list[float]] = {}
        for _ in range(2):
            x = {n: v.to(dtype).double() if n in ("p", "z_before", "v_before") and v is not None else v
                 for n, v in case.inputs().items()}  # fmt: skip
            outputs, grads, results = expected(case, x)
            ours = kernels(case, x, grads, dtype, device=device)
            theirs = plain(case, x, grads, dtype)
            names = ("q", "k", "v", *GRADIENTS)
            for which, got in enumerate((ours, theirs)):
                for name, a, b in zip(names, (*got[0], *got[1]), (*outputs, *results), strict=True):
                    if b is not None:
                        errors.setdefault(name, [0.0, 0.0])[which] += (a.double().cpu() - b).square().mean().item()
        for name, (our_error, their_error) in errors.items():
            assert our_error <= 4 * their_error, name
        off_by_one_percent = (1.01 * ours[0][0].double().cpu() - outputs[0]).square().mean().item()
        assert off_by_one_percent > 4 * errors["q"][1]


def plain(case: Case, x: dict[str, Tensor | None], grads: list[Tensor], dtype: torch.dtype) -> tuple[list, list]:
    x = {name: None if value is None else value if name == "ages" else value.to(dtype) for name, value in x.items()}
    rows = (x["p"], x["z_before"], x["v_before"], x["ages"], case.chunks)
    taps = Taps(*(x[name].float() for name in ("w0", "b0", "w1", "b1")))
    rest = (taps, x["beta"].float(), (x["cos"].float(), x["sin"].float()), case.switches)
    q, k, v, inv = prologue_plain.forward(*rows, *rest)
    grads = [grad.to(dtype) for grad in grads]
    *results, grad_taps, grad_beta = prologue_plain.backward(*grads, q, k, inv, *rows, *rest)
    return [q, k, v], [*results, grad_taps.w0, grad_taps.b0, grad_taps.w1, grad_taps.b1, grad_beta]


def test_rows_of_any_strides(device):
    case = Case(before=True, chunks=(20,), batch_size=2)
    x = case.inputs()
    _, grads, _ = expected(case, x)
    outputs, results = kernels(case, x, grads, device=device)
    wide = torch.cat([x["p"], x["p"]], dim=-1).float().to(device)[..., : x["p"].shape[-1]]
    assert not wide.is_contiguous()
    strided = [grad.transpose(1, 2).contiguous().transpose(1, 2).float() for grad in grads]
    again, results_again = kernels(case, x | {"p": wide}, strided, device=device)
    for a, b in zip([*outputs, *results], [*again, *results_again], strict=True):
        assert torch.equal(a, b)


def test_two_runs_give_the_same_bits_and_other_tiles_the_same_numbers(device):
    case = Case(before=True, documents=((-3, 8),), chunks=(30, 21))
    x = case.inputs()
    _, grads, _ = expected(case, x)
    first, second = (kernels(case, x, grads, device=device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True))
    third = kernels(case, x, grads, tilings=(None, None), device=device)
    for a, b in zip(first[0] + first[1], third[0] + third[1], strict=True):
        assert difference(a, b) < 1e-5


def wrong_gradients(case: Case, device) -> list[str]:
    """Which gradients are off."""
    x = case.inputs()
    _, grads, results = expected(case, x)
    _, ours = kernels(case, x, grads, device=device)
    return [name for name, a, b in zip(GRADIENTS, ours, results, strict=True) if difference(a, b) > 1e-2]


def test_what_a_range_leaves_for_the_next_and_reads_behind_itself_is_seen(device, monkeypatch):
    case = Case(chunks=(40,))
    assert wrong_gradients(case, device) == []
    with monkeypatch.context() as patch:
        cut = ccgqa_prologue_workspace.cut
        patch.setattr(
            ccgqa_prologue_workspace, "cut", lambda *sizes: tuple(replace(rows, adds=False) for rows in cut(*sizes))
        )
        assert wrong_gradients(case, device) == ["w0", "b0", "w1", "b1", "beta"]
    launch = ccgqa_prologue_norm.launch

    def spoil_what_is_behind(workspace, tensors, rows):
        launch(workspace, tensors, rows)
        workspace.dy[:, rows.stop - rows.first :] = torch.nan

    monkeypatch.setattr(ccgqa_prologue_norm, "launch", spoil_what_is_behind)
    assert "p" in wrong_gradients(case, device)


def test_a_range_of_several_batch_rows(device):
    case = CASES["three batch rows"]
    x = case.inputs()
    _, grads, results = expected(case, x)
    two_of_three = replace(SMALL[1], dy_bytes=2 * 17 * 32 * 4)
    _, ours = kernels(case, x, grads, tilings=(SMALL[0], two_of_three), device=device)
    assert all(difference(a, b) < 1e-5 for a, b in zip(ours, results, strict=True))


def test_no_rows_at_all(device):
    case = Case(chunks=(0,))
    x = case.inputs()
    grads = [torch.zeros(1, 0, heads, 16) for heads in (2, 1, 1)]
    outputs, results = kernels(case, x, grads, device=device)
    assert [out.numel() for out in outputs] == [0, 0, 0]
    assert all(not grad.any() for grad in results if grad is not None)
