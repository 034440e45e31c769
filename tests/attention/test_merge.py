"""Merging partial results: two parts equal the whole, at every edge."""

import pytest
import torch

from hydra_dist.attention import reference
from hydra_dist.attention.merge import merge, merge_into


def attend(q, k, v):
    return reference.forward(q, k, v, None, q.shape[-1] ** -0.5)


@pytest.fixture
def qkv():
    return [torch.randn(2, 12, 3, 8, dtype=torch.float64) for _ in range(3)]


@pytest.fixture
def halves(qkv):
    q, k, v = qkv
    return *attend(q, k[:, :5], v[:, :5]), *attend(q, k[:, 5:], v[:, 5:])


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_two_parts_equal_the_whole(qkv, cut):
    q, k, v = qkv
    whole, whole_lse = attend(q, k, v)
    out, lse = merge(*attend(q, k[:, :cut], v[:, :cut]), *attend(q, k[:, cut:], v[:, cut:]))
    assert difference(out, whole) < 1e-14
    assert difference(lse, whole_lse) < 1e-14


def test_many_parts_in_place_and_in_any_order(qkv):
    q, k, v = qkv
    out, lse = torch.zeros_like(q), torch.full((2, 3, 12), -torch.inf, dtype=q.dtype)
    for key in torch.randperm(12).tolist():
        merge_into(out, lse, *attend(q, k[:, key : key + 1], v[:, key : key + 1]))
    whole, whole_lse = attend(q, k, v)
    assert difference(out, whole) < 1e-14
    assert difference(lse, whole_lse) < 1e-14


def test_the_checks_above_reject_a_mean_and_a_merge_without_lse(qkv, halves):
    whole, _ = attend(*qkv)
    out_a, lse_a, out_b, lse_b = halves
    assert difference(0.5 * (out_a + out_b), whole) > 1e-2
    assert difference(merge(out_a, torch.zeros_like(lse_a), out_b, torch.zeros_like(lse_b))[0], whole) > 1e-2


def test_in_place_into_views_leaves_the_other_rows_alone(halves):
    out_a, lse_a, out_b, lse_b = halves
    out, lse = out_a.clone(), lse_a.clone()
    merge_into(out[:1, 3:7], lse[:1, :, 3:7], out_b[:1, 3:7], lse_b[:1, :, 3:7])
    expected, expected_lse = merge(out_a, lse_a, out_b, lse_b)
    torch.testing.assert_close(out[0, 3:7], expected[0, 3:7])
    torch.testing.assert_close(lse[0, :, 3:7], expected_lse[0, :, 3:7])
    out[0, 3:7], lse[0, :, 3:7] = out_a[0, 3:7], lse_a[0, :, 3:7]
    assert torch.equal(out, out_a)
    assert torch.equal(lse, lse_a)


@pytest.mark.parametrize("garbage", [0.0, 7.0, torch.inf, torch.nan])
def test_rows_without_keys(halves, garbage):
    out, lse, *_ = halves
    unseen = torch.zeros_like(lse, dtype=torch.bool)
    unseen[:, :, ::2] = True
    part_lse = lse.masked_fill(unseen, -torch.inf)
    part = out.clone()
    part[:, ::2] = garbage
    nothing, nothing_lse = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for merged, merged_lse in (
        merge(part, part_lse, nothing, nothing_lse),
        merge(nothing, nothing_lse, part, part_lse),
    ):
        assert torch.equal(merged[:, 1::2], out[:, 1::2])
        assert torch.equal(merged[:, ::2], torch.zeros_like(out[:, ::2]))
        assert torch.equal(merged_lse, part_lse)
    kept, kept_lse = merge(out, lse, torch.full_like(out, garbage), nothing_lse)
    assert torch.equal(kept, out)
    assert torch.equal(kept_lse, lse)


@pytest.mark.parametrize("shift", [-5e4, 5e4])
def test_far_apart_normalisers_do_not_overflow(halves, shift):
    out_a, lse_a, out_b, lse_b = (x.float() for x in halves)
    out, lse = merge(out_a, lse_a, out_b, lse_b + shift)
    assert torch.equal(out, out_a if shift < 0 else out_b)
    assert torch.equal(lse, lse_a if shift < 0 else lse_b + shift)


def test_narrow_parts_are_merged_in_fp32_and_inputs_stay_as_they_are(halves):
    out_a, lse_a, out_b, lse_b = (x.float() for x in halves)
    inputs = out_a.bfloat16(), lse_a, out_b.bfloat16(), lse_b
    before = [x.clone() for x in inputs]
    out, lse = merge(*inputs)
    assert out.dtype == lse.dtype == torch.float32
    assert difference(out, merge(inputs[0].float(), lse_a, inputs[2].float(), lse_b)[0]) < 1e-7
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
