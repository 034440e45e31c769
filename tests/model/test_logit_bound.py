"""What a CCGQA layer knows of the size of its logits without looking at them."""

import copy
import math

import pytest
import torch

from hydra_dist.attention import LARGEST_LOGIT_BOUND
from hydra_dist.model import CCGQA
from hydra_dist.model.prologue import HIGHEST_CLAMPED, Prologue
from hydra_dist.model.rope import rope_tables
from hydra_dist.model.sequence import WholeSequence


def prologue_of(temperature="exp", head_dim=64, use_qk_norm=True):
    return Prologue(4, 2, head_dim, (2, 2), True, use_qk_norm, True, temperature)


def with_tau(values, temperature="exp", head_dim=64):
    module = prologue_of(temperature, head_dim)
    module.tau.data.copy_(torch.tensor(values))
    module.refresh_logit_bound(0.0)
    return module


def largest_logit(module, dtype):
    """Of 30 rows with keys along their queries: all heads are equal, and the convolutions' weights are zero."""
    d = module.switches.head_dim
    p = torch.randn(1, 30, d, generator=torch.Generator().manual_seed(0)).to(dtype).repeat(1, 1, 8)
    q, k, _ = module.to(dtype)(p, None, None, None, [30], rope_tables(torch.arange(30), d // 2, 1e4, dtype))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double().repeat_interleave(2, 2)) / math.sqrt(d)
    return scores.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "temperature,tau", [("exp", (0.3, 1.5)), ("raw", (-4.0, 2.0)), ("exp_clamp", (0.5, 1.0)), ("exp_clamp", (9.0, 1.0))]
)
def test_no_logit_passes_the_bound_and_some_reach_temperature_times_root_of_head_dim(temperature, tau, dtype):
    module = with_tau(tau, temperature)
    bound = module.logit_bound()
    largest = largest_logit(module, dtype)
    beta = module.beta().abs().max().item()
    assert 0.97 * beta * 8.0 < largest <= bound <= LARGEST_LOGIT_BOUND


def test_the_bound_holds_while_tau_moves_by_what_was_allowed():
    module = with_tau((0.0, 0.0))
    narrow = module.logit_bound()
    module.refresh_logit_bound(1.0)
    wide = module.logit_bound()
    module.tau.data[1] = 0.99
    assert narrow < largest_logit(module, torch.float64) <= wide


def test_unknown_and_useless_bounds_are_none():
    assert prologue_of("exp").logit_bound() is None
    assert prologue_of("raw").logit_bound() is None
    assert prologue_of(use_qk_norm=False).logit_bound() is None
    without = prologue_of(use_qk_norm=False)
    without.refresh_logit_bound(0.0)
    assert without.logit_bound() is None
    for tau in (math.log(7.6), 800.0, math.inf, math.nan):
        assert with_tau((0.0, tau)).logit_bound() is None
    assert with_tau((0.0, math.log(7.4))).logit_bound() == LARGEST_LOGIT_BOUND
    assert with_tau((-50.0, -60.0)).logit_bound() == 10.0


def test_a_clamped_temperature_needs_no_look_at_tau():
    assert math.exp(HIGHEST_CLAMPED) * 8.0 < prologue_of("exp_clamp").logit_bound() == LARGEST_LOGIT_BOUND
    assert prologue_of("exp_clamp", head_dim=128).logit_bound() is None  # 83.6
    module = prologue_of("exp_clamp", head_dim=128)
    module.refresh_logit_bound(0.1)
    assert module.logit_bound() == 20.0


def test_a_loaded_state_is_not_known_until_it_is_read():
    module, other = with_tau((0.0, 0.0)), with_tau((0.0, 3.0))
    assert module.logit_bound() == 10.0
    module.load_state_dict(other.state_dict())
    assert module.logit_bound() is None
    module.refresh_logit_bound(0.0)
    assert module.logit_bound() is None  # 161
    clamped = with_tau((0.1, 0.1), "exp_clamp")
    clamped.load_state_dict(copy.deepcopy(clamped).state_dict())
    assert clamped.logit_bound() == LARGEST_LOGIT_BOUND


def test_what_a_refresh_refuses():
    module = prologue_of()
    for change in (-0.1, math.nan):
        with pytest.raises(ValueError, match=r"largest_change (-0\.1|nan)"):
            module.refresh_logit_bound(change)
    module.tau.data = torch.empty(0)
    with pytest.raises(ValueError, match="tau has 0 elements here and 2 in all; gather it first"):
        module.refresh_logit_bound(0.0)


def test_reading_the_bound_is_a_constant_to_the_compiler():
    module, traced = with_tau((0.0, 0.0)), []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: x * module.logit_bound(), backend=backend, fullgraph=True)
    for tau in (0.0, 0.05, 0.1):  # one step of the bound
        module.tau.data.fill_(tau)
        module.refresh_logit_bound(0.0)
        assert compiled(torch.ones(1)).item() == 10.0
    assert len(traced) == 1


class Listens(WholeSequence):
    def attention(self, q, k, v, causal=True, window=None, logit_bound=None):
        self.heard = logit_bound
        return super().attention(q, k, v, causal, window, logit_bound)


def test_the_layer_tells_attention_what_it_knows():
    layer, seq = CCGQA(16, 4, 2, 8), Listens(6, torch.device("cpu"))
    x = torch.randn(1, 6, 16)
    unknown = layer(x, seq)
    assert seq.heard is None
    layer.prologue.refresh_logit_bound(0.5)
    known = layer(x, seq)
    assert seq.heard == 10.0
    assert torch.equal(known, unknown)
