"""Merging bounded scores by plain addition: equal to the general way, no less exact, and never wrong without a sign."""

import math

import pytest
import torch

from hydra_dist.attention import LARGEST_LOGIT_BOUND, merge_rule, reference
from hydra_dist.attention.merge import LogSumExp, PlainAddition

MOST_KEYS = math.log(2.0**40)


def added(rule, parts, dtype=None, **options):
    out, lse = rule.start(parts[0][0])
    for part in parts:
        rule.add(out, lse, *part, **options)
    return rule.finish(out, lse, out.dtype if dtype is None else dtype)


def exactly(parts):
    """By the definition, in fp64 and relative to the largest lse of each row."""
    outs, lses = (torch.stack([part[i].double() for part in parts]) for i in (0, 1))
    lse = lses.logsumexp(0)
    share = (lses - lse).exp().transpose(-1, -2).unsqueeze(-1)
    return (share * outs).sum(0), lse


def difference(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def random_parts(num_parts, dtype, seed=0, spread=2.0):
    """Parts of 40 queries that saw about as many keys as in a training run."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(num_parts):
        out = torch.randn(2, 40, 3, 8, generator=generator, dtype=torch.float64)
        lse = torch.randn(2, 3, 40, generator=generator, dtype=torch.float64)
        parts.append((out.to(dtype), (math.log(4096.0) + spread * lse).to(dtype)))
    return parts


@pytest.mark.parametrize("num_parts", [1, 2, 5, 16])
@pytest.mark.parametrize("all_see_keys", [False, True])
def test_both_ways_and_any_order_are_equal_in_fp64(num_parts, all_see_keys):
    parts = random_parts(num_parts, torch.float64, spread=12.0)
    wanted = exactly(parts)
    for rule in (LogSumExp(), PlainAddition()):
        for order in (parts, parts[::-1], [parts[i] for i in torch.randperm(num_parts)]):
            out, lse = added(rule, order, all_see_keys=all_see_keys)
            assert difference(out, wanted[0]) < 1e-13
            assert difference(lse, wanted[1]) < 1e-13


def test_keys_in_parts_equal_all_keys():
    q, k, v = (torch.randn(2, 12, 3, 8, dtype=torch.float64) for _ in range(3))
    parts = [reference.forward(q, k[:, i : i + 1], v[:, i : i + 1], None, 8**-0.5) for i in torch.randperm(12)]
    out, lse = added(PlainAddition(), parts)
    whole, whole_lse = reference.forward(q, k, v, None, 8**-0.5)
    assert difference(out, whole) < 1e-14
    assert difference(lse, whole_lse) < 1e-14


def test_putting_the_first_part_equals_adding_it_into_views_too():
    parts = random_parts(3, torch.float64)
    rule = PlainAddition()
    out, lse = rule.start(parts[0][0])
    out[:, 10:], lse[:, :, 10:] = 5.0, 7.0  # overwritten
    for rows in (slice(0, 10), slice(10, 40)):
        for index, (part_out, part_lse) in enumerate(parts):
            write = rule.put if index == 0 and rows.start else rule.add
            write(out[:, rows], lse[:, :, rows], part_out[:, rows], part_lse[:, :, rows])
    for ours, wanted in zip(rule.finish(out, lse, out.dtype), added(rule, parts), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("num_parts", [2, 4, 8, 16])
def test_fp32_loses_no_more_than_the_general_way(num_parts):
    squares = torch.zeros(2, 2, dtype=torch.float64)
    for seed in range(10):
        parts = random_parts(num_parts, torch.float32, seed)
        wanted = exactly(parts)
        for row, rule in enumerate((PlainAddition(), LogSumExp())):
            for column, (ours, exact) in enumerate(zip(added(rule, parts), wanted, strict=True)):
                squares[row, column] += (ours.double() - exact).square().mean()
    # The division at the end is one rounding more, and each part after that is fewer than in the general way.
    assert (squares[0].sqrt() <= (1.15 if num_parts == 2 else 0.9) * squares[1].sqrt()).all(), squares.sqrt()
    assert (squares[0].div(10).sqrt() < 1e-6).all(), squares.sqrt()


def edge(bound, value):
    """Rows over one key at the lowest score, 2^39 twice at the highest, and both; values of a given size."""
    low, high = -bound, bound + MOST_KEYS - math.log(2.0)
    lse = torch.tensor([[low, high, low], [-torch.inf, high, high]]).view(2, 1, 1, 3)
    out = value * (1 + torch.rand(2, 1, 3, 1, 8))
    return [(out[0], lse[0]), (out[1], lse[1])]


def scaled_sums(parts, scale, shift):
    """Plain addition in fp32 with weights scale x exp(lse - shift) and no safeguard."""
    weights = [((lse - shift).exp() * scale).transpose(1, 2).unsqueeze(-1) for _, lse in parts]
    return sum(w * out for w, (out, _) in zip(weights, parts, strict=True)) / sum(weights)


@pytest.mark.parametrize("value", [1e-4, 1.0, 7e5])
def test_the_largest_bound_is_safe_and_the_same_with_another_reference_is_not(value):
    parts = edge(LARGEST_LOGIT_BOUND, value)
    out, lse = added(merge_rule(LARGEST_LOGIT_BOUND), parts)
    wanted, wanted_lse = exactly(parts)
    assert difference(out, wanted) < 1e-6
    assert difference(lse, wanted_lse) < 1e-6
    assert torch.isnan(scaled_sums(parts, 1.0, LARGEST_LOGIT_BOUND)).any()  # the lowest weights are 0
    if value > 1e3:
        assert not torch.isfinite(scaled_sums(parts, 1.0, 0.0)).all()  # the highest sums are infinite


def test_beyond_the_largest_bound_plain_addition_is_wrong_and_not_taken():
    bound = 80.0
    parts = edge(bound, 1.0)
    wanted, _ = exactly(parts)
    naive = scaled_sums(parts, 2.0**-20, 0.0)
    assert difference(naive[:, :1], wanted[:, :1]) > 1e-5  # weights of exp(-94): digits are lost
    assert not torch.isfinite(naive[:, 1:]).all()  # exp(108)
    for rule, right in ((merge_rule(bound), True), (PlainAddition(), False)):
        out, _ = added(rule, parts)
        assert torch.isfinite(out).all() == right
        assert not right or difference(out, wanted) < 1e-5
    for rows in out.unbind(1):
        assert not torch.isfinite(rows).any()  # said, not wrong


@pytest.mark.parametrize("all_see_keys", [False, True])
@pytest.mark.parametrize("lse", [-62.0, -95.0, -1e30, 90.0, 1e30, torch.nan])
def test_scores_outside_of_any_bound_are_never_a_finite_result(lse, all_see_keys):
    normal, strange = random_parts(2, torch.float32)
    strange[1][:, :, 3] = lse
    out, lse = added(PlainAddition(), [normal, strange], all_see_keys=all_see_keys)
    assert not torch.isfinite(out[:, 3]).any()
    assert not torch.isfinite(lse[:, :, 3]).any()
    assert torch.isfinite(out[:, 4:]).all()


@pytest.mark.parametrize("garbage", [7.0, torch.inf, torch.nan])
def test_queries_without_keys(garbage):
    seen, partly = random_parts(2, torch.float32)
    partly[0][:, ::2], partly[1][:, :, ::2] = garbage, -torch.inf
    nothing = torch.full_like(seen[0], garbage), torch.full_like(seen[1], -torch.inf)
    out, lse = added(PlainAddition(), [nothing, seen, partly])
    wanted, wanted_lse = added(PlainAddition(), [seen])
    assert torch.equal(out[:, ::2], wanted[:, ::2])
    assert torch.equal(lse[:, :, ::2], wanted_lse[:, :, ::2])
    assert torch.isfinite(out).all()
    out, lse = added(PlainAddition(), [partly, nothing])
    assert torch.equal(out[:, ::2], torch.zeros_like(out[:, ::2]))
    assert bool((lse[:, :, ::2] == -torch.inf).all())
    assert difference(out[:, 1::2], partly[0][:, 1::2]) < 1e-6


def test_narrow_parts_are_added_in_fp32_and_the_result_has_the_dtype_asked_for():
    parts = [(out.bfloat16(), lse) for out, lse in random_parts(3, torch.float32)]
    out, lse = added(PlainAddition(), parts)
    assert out.dtype == lse.dtype == torch.float32
    assert difference(out, exactly(parts)[0]) < 1e-6
    narrow, lse = added(PlainAddition(), parts, torch.bfloat16)
    assert torch.equal(narrow, out.bfloat16())
    assert lse.dtype == torch.float32


def test_which_rule_a_bound_leads_to():
    for bound in (None, LARGEST_LOGIT_BOUND + 0.01, 1e9, math.inf):
        assert isinstance(merge_rule(bound), LogSumExp)
    for bound in (0.0, 11.3, LARGEST_LOGIT_BOUND):
        assert isinstance(merge_rule(bound), PlainAddition)
    for bound in (-1.0, math.nan):
        with pytest.raises(ValueError, match=r"logit_bound (-1\.0|nan): a bound on \|score\| is 0 or more"):
            merge_rule(bound)
