"""The prologue operator in plain PyTorch: chunks and the rows before them, blocks, low precision, what it keeps."""

import itertools

import pytest
import torch
from torch.nn import functional

from hydra_dist.errors import ConfigError
from hydra_dist.model import prologue_plain
from hydra_dist.model.prologue import Prologue
from hydra_dist.model.prologue_operator import choose
from hydra_dist.model.rope import rope_tables

HEADS, DIM = (4, 2), 4
LATENT, VALUE = 24, 8


def prologue_of(randomize, kernel_sizes=(2, 2), **changes):
    arguments = {"use_qk_mean": True, "use_qk_norm": True, "use_value_shift": True, **changes}
    return randomize(Prologue(*HEADS, DIM, kernel_sizes, **arguments))


def bare(randomize, kernel_sizes):
    """Convolutions alone."""
    return prologue_of(randomize, kernel_sizes, use_qk_mean=False, use_qk_norm=False, use_value_shift=False)


def torchs_convolutions(module, z):
    """Conv1d twice over z [B, T, C], which has the rows before it."""
    k1 = module.switches.kernel_sizes[1]
    u = functional.conv1d(z.mT, module.depthwise_weight.unsqueeze(1), module.depthwise_bias, groups=LATENT)
    weight = module.grouped_weight.view(6, k1, DIM, DIM).permute(0, 3, 2, 1).reshape(LATENT, DIM, k1)
    return functional.conv1d(u, weight, module.grouped_bias.flatten(), groups=6).mT.unflatten(-1, (6, DIM))


@pytest.mark.parametrize("kernel_sizes", [(1, 1), (1, 3), (2, 2), (3, 1), (5, 4)])
def test_convolutions_equal_torchs(kernel_sizes, randomize, relative_error):
    module = bare(randomize, kernel_sizes)
    p = torch.randn(2, 11, LATENT + VALUE, dtype=torch.float64, requires_grad=True)
    before = torch.randn(2, 1, module.num_rows_before, LATENT, dtype=torch.float64, requires_grad=True)
    ours = torch.cat(module(p, before, None, None, [11], None)[:2], dim=2)
    theirs = torchs_convolutions(module, torch.cat([before[:, 0], p[..., :LATENT]], dim=1))
    assert relative_error(ours, theirs) < 1e-13
    weights = torch.randn(ours.shape, dtype=torch.float64)
    inputs = [p, *([before] if module.num_rows_before else []), *module.parameters()]
    grads = torch.autograd.grad((ours * weights).sum(), inputs)
    for a, b in zip(grads, torch.autograd.grad((theirs * weights).sum(), inputs), strict=True):
        assert relative_error(a, b) < 1e-13


def test_low_precision_loses_no_more_than_torchs_convolutions(randomize):
    module = bare(randomize, (2, 2)).bfloat16()
    p = torch.randn(2, 30, LATENT + VALUE).bfloat16()
    z = functional.pad(p[..., :LATENT], (0, 0, 2, 0))
    exact = torchs_convolutions(module.double(), z.double())
    module.bfloat16()
    with torch.no_grad():
        ours = torch.cat(module(p, None, None, None, [30], None)[:2], dim=2)
        errors = [(y.double() - exact).square().mean().sqrt() for y in (ours, torchs_convolutions(module, z))]
    assert errors[0] <= 1.15 * errors[1]


def whole_and_chunks(module, documents):
    """q, k, v and all gradients of 20 rows at once, and of three chunks of them with the rows before each."""
    torch.manual_seed(3)
    p = torch.randn(2, 20, LATENT + VALUE, dtype=torch.float64)
    weights = torch.randn(2, 20, LATENT + VALUE, dtype=torch.float64)
    chunks, h = [(0, 5), (13, 14), (14, 20)], module.num_rows_before
    starts = torch.tensor([0, 0, 0, 3, 3, 3, 6, 6, 6, 6, 6, 11, 11, 13, 14, 14, 14, 17, 17, 17])
    ages = (torch.arange(20) - starts).repeat(2, 1) if documents else None
    rope = rope_tables(torch.arange(20), 2, 50.0, torch.float64)
    local = torch.cat([torch.arange(a, b) for a, b in chunks])
    results = []
    for cut in (False, True):
        leaf = p.clone().requires_grad_()
        module.zero_grad()
        if not cut:
            out = module(leaf, None, None, ages, [20], rope)
            out = [x[:, local] for x in out]
        else:
            padded = functional.pad(leaf, (0, 0, h + 1, 0))
            before, late = [], []
            for first, _ in chunks:
                begin = int(starts[first]) if documents else 0
                inside = (torch.arange(first - h - 1, first) >= begin).unsqueeze(-1)
                rows = padded[:, first : first + h + 1].masked_fill(~inside, 0.0)
                before.append(rows[:, 1:, :LATENT])
                late.append(rows[:, -1:, LATENT + VALUE // 2 :])
            some = None if ages is None else ages[:, local]
            lengths = [b - a for a, b in chunks]
            tables = tuple(x[local] for x in rope)
            out = module(leaf[:, local], torch.stack(before, 1), torch.stack(late, 1), some, lengths, tables)
        loss = sum((x.flatten(2) * w).sum() for x, w in zip(out, weights[:, local].split([16, 8, 8], -1), strict=True))
        loss.backward()
        results.append([*out, leaf.grad, *(x.grad.clone() for x in module.parameters())])
    return results


@pytest.mark.parametrize("block_rows", [1024, 4, 3])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kernel_sizes", [(1, 1), (2, 2), (4, 3), None])
def test_chunks_with_the_rows_before_them_equal_the_whole(
    kernel_sizes, documents, block_rows, monkeypatch, randomize, relative_error
):
    module = prologue_of(randomize, kernel_sizes)
    whole, _ = whole_and_chunks(module, documents)
    monkeypatch.setattr(prologue_plain, "BLOCK_ROWS", block_rows)
    for ours in whole_and_chunks(module, documents):
        for a, b in zip(ours, whole, strict=True):
            assert relative_error(a, b) < 1e-13


def test_chunks_without_the_rows_before_them_do_not(randomize, relative_error):
    module = prologue_of(randomize)
    p = torch.randn(1, 10, LATENT + VALUE, dtype=torch.float64)
    whole = module(p, None, None, None, [10], None)
    cut = module(p, None, None, None, [4, 6], None)
    for a, b in zip(whole, cut, strict=True):
        assert relative_error(a[:, :4], b[:, :4]) < 1e-14
        assert relative_error(a[:, 4:6], b[:, 4:6]) > 1e-2
        assert relative_error(a[:, 7:], b[:, 7:]) < 1e-14


@pytest.mark.parametrize("values", list(itertools.product([False, True], repeat=4)))
def test_operators_keep_pytorchs_rules(values, randomize):
    mean, norm, shift, convs = values
    module = prologue_of(
        randomize, (2, 2) if convs else None, use_qk_mean=mean, use_qk_norm=norm, use_value_shift=shift
    ).float()
    taps = [module.depthwise_weight, module.depthwise_bias, module.grouped_weight, module.grouped_bias]
    p = torch.randn(1, 6, LATENT + VALUE, requires_grad=True)
    ages = torch.tensor([[0, 1, 2, 0, 0, 1]])
    rope = rope_tables(torch.arange(6), 2, 50.0, torch.float32)
    arguments = (p, None, None, ages, *taps, module.beta(), *rope, [6], *HEADS, DIM, [2, 2] if convs else [1, 1], mean)
    arguments += (1e-12 if norm else None, shift, "auto")
    torch.library.opcheck(torch.ops.hydra_dist.ccgqa_prologue.default, arguments)


def test_a_second_derivative_is_refused(randomize):
    module = prologue_of(randomize)
    p = torch.randn(1, 6, LATENT + VALUE, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(module(p, None, None, None, [6], None)[0].square().sum(), p, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_what_is_kept_for_backward(randomize):
    """The projection, and one number a row and head; queries and keys are kept by attention as well."""
    module = prologue_of(randomize).float()
    p = torch.randn(1, 100, LATENT + VALUE, requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        q, k, _ = module(p, None, None, None, [100], None)
    rows = [x for x in kept.values() if x.shape[:2] == (1, 100)]
    own = [x for x in rows if x.data_ptr() not in (q.data_ptr(), k.data_ptr())]
    assert sorted(x.numel() for x in own) == [100 * 6, 100 * (LATENT + VALUE)]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"kernel_sizes": (2, 0)}, r"conv_kernel_sizes \(2, 0\) is not two positive numbers; \(2, 2\) works"),
        ({"temperature": "exponential"}, 'temperature "exponential": known are exp, raw, exp_clamp'),
    ],
)
def test_what_cannot_work_is_refused(arguments, said, randomize):
    with pytest.raises(ConfigError, match=said):
        prologue_of(randomize, **arguments)


def test_choosing_a_backend(randomize):
    switches = prologue_of(randomize).switches
    cpu = torch.device("cpu")
    assert choose("auto", cpu, torch.float32, switches) == ("plain", "not triton (Triton kernels do not run on cpu)")
    assert choose("plain", cpu, torch.float32, switches)[0] == "plain"
    with pytest.raises(ConfigError, match="Triton kernels do not run on cpu; plain works"):
        choose("triton", cpu, torch.float32, switches)
    with pytest.raises(ConfigError, match='"tritn": known are auto, triton, plain'):
        choose("tritn", cpu, torch.float32, switches)


@pytest.mark.parametrize(
    "pieces", [{}, *({name: False} for name in ("use_qk_mean", "use_qk_norm", "use_value_shift"))], ids=str
)
@pytest.mark.parametrize("kernel_sizes", [(2, 2), (3, 1), None])
def test_gradcheck_with_documents_and_rows_before(pieces, kernel_sizes, randomize):
    module = prologue_of(randomize, kernel_sizes, **pieces)
    names = list(dict(module.named_parameters()))
    p = torch.randn(1, 5, LATENT + VALUE, dtype=torch.float64, requires_grad=True)
    before = torch.randn(1, 2, module.num_rows_before, LATENT, dtype=torch.float64, requires_grad=True)
    late = torch.randn(1, 2, 1, VALUE // 2, dtype=torch.float64, requires_grad=True)
    ages = torch.tensor([[7, 8, 0, 3, 0]])  # the chunk of the last two rows begins in the middle of a document
    rope = rope_tables(torch.tensor([7, 8, 9, 20, 21]), 2, 50.0, torch.float64)

    def run(p, before, late, *parameters):
        halos = (before if module.num_rows_before else None, late if module.switches.value_shift else None)
        arguments = (p, *halos, ages, [3, 2], rope)
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), arguments)

    assert torch.autograd.gradcheck(run, [p, before, late, *module.parameters()])
