"""Many runs of rows, two at a time, against all of them at once."""

import pytest
import torch

from hydra_dist.kernels import ccgqa_prologue_rows
from hydra_dist.model import prologue_pairs, prologue_plain
from hydra_dist.model.convolution import Taps
from hydra_dist.model.prologue_plain import Switches

RUNS = [3, 1, 7, 2, 5]


def problem(convolutions, norm, shift):
    torch.manual_seed(0)
    switches = Switches(4, 2, 8, (3, 2) if convolutions else (1, 1), True, 1e-12 if norm else None, shift)
    C, V, S, before = switches.latent_size, switches.value_size, sum(RUNS), switches.num_rows_before
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    taps = (draw(C, 3), draw(C), draw(6, 16, 8), draw(6, 8)) if convolutions else (None,) * 4
    halos = (draw(2, 5, before, C) if convolutions else None, draw(2, 5, 1, V // 2) if shift else None)
    ages = torch.randint(0, 4, (2, S), dtype=torch.int32)
    rope = (draw(S, 1, 3), draw(S, 1, 3))
    return switches, draw(2, S, C + V), halos, ages, taps, draw(2).exp() if norm else None, rope


def run_forward(switches, p, z, v, ages, lengths, w0, b0, w1, b1, beta, cosines, sines):
    taps = None if w0 is None else Taps(w0, b0, w1, b1)
    return prologue_plain.forward(p, z, v, ages, lengths, taps, beta, (cosines, sines), switches)


def run_backward(switches, b1, *arguments):
    *rows, w0, b0, w1, beta, cosines, sines = arguments
    taps = None if w0 is None else Taps(w0, b0, w1, b1)
    *grads, taps, beta = prologue_plain.backward(*rows, taps, beta, (cosines, sines), switches)
    return *grads, *((None,) * 4 if taps is None else (taps.w0, taps.b0, taps.w1, taps.b1)), beta


@pytest.mark.parametrize("convolutions", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_pairs_are_what_all_runs_at_once_are(convolutions, norm, shift):
    switches, p, halos, ages, taps, beta, rope = problem(convolutions, norm, shift)
    lengths = []

    def few(*arguments):
        lengths.append(arguments[4])
        return run_forward(switches, *arguments)

    whole = run_forward(switches, p, *halos, ages, RUNS, *taps, beta, *rope)
    found = prologue_pairs.forward(few, p, *halos, ages, RUNS, (*taps, beta), *rope)
    assert lengths == [[3, 1], [7, 2], [5]]
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))

    q, k, v, inv = whole
    of_rows = (torch.randn_like(q), torch.randn_like(k), torch.randn_like(v), q, k, inv, p)
    w0, b0, w1, b1 = taps
    rest = (*halos, ages, RUNS)
    expected = run_backward(switches, b1, *of_rows, *rest, w0, b0, w1, beta, *rope)
    grads = prologue_pairs.backward(
        lambda *a: run_backward(switches, b1, *a), of_rows, *rest, (w0, b0, w1, beta), *rope
    )
    for a, b in zip(grads, expected, strict=True):
        assert (a is None) is (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_pair_is_what_the_kernels_take():
    assert ccgqa_prologue_rows.MAX_CHUNKS == prologue_pairs.AT_ONCE
