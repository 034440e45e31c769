"""Rotary embedding: pairing, lengths, relative positions, and tables that hold at a million tokens."""

import math

import pytest
import torch

from hydra_dist.model.rope import rope_tables, rotate


def test_pairs_are_half_a_rope_dim_apart_and_the_rest_stays(relative_error):
    x = torch.randn(2, 3, 2, 8, dtype=torch.float64)
    positions = torch.tensor([0, 5, 1000])
    ours = rotate(x, rope_tables(positions, 6, 100.0, x.dtype))
    expected = x.clone()
    for s, position in enumerate(positions.tolist()):
        for i in range(3):
            angle = position * 100.0 ** (-2 * i / 6)
            a, b = x[:, s, :, i], x[:, s, :, i + 3]
            expected[:, s, :, i] = a * math.cos(angle) - b * math.sin(angle)
            expected[:, s, :, i + 3] = b * math.cos(angle) + a * math.sin(angle)
    assert relative_error(ours, expected) < 1e-13
    interleaved = expected[..., [0, 3, 1, 4, 2, 5, 6, 7]]
    assert relative_error(ours, interleaved) > 0.1


def test_logits_depend_on_the_distance_alone(relative_error):
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).unbind()

    def logit(q_position, k_position):
        turned = [
            rotate(x, rope_tables(torch.tensor([p]), 16, 1e4, x.dtype)) for x, p in ((q, q_position), (k, k_position))
        ]
        return (turned[0] * turned[1]).sum(-1)

    assert relative_error(logit(1_000_007, 1_000_000), logit(7, 0)) < 1e-8


def test_no_rotation():
    x = torch.randn(1, 4, 2, 8)
    assert rope_tables(torch.arange(4), 0, 1e4, x.dtype) is None
    assert rotate(x, None) is x


@pytest.mark.parametrize("position", [1_000_000, 16_000_000])
def test_fp32_tables_are_right_far_out(position):
    cosines, sines = rope_tables(torch.tensor([position]), 64, 5e6, torch.bfloat16)
    assert cosines.dtype == torch.float32
    angles = position * 5e6 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert (cosines[0, 0] - angles.cos()).abs().max() < 1e-7
    assert (sines[0, 0] - angles.sin()).abs().max() < 1e-7
    in_fp32 = (position * 5e6 ** (-torch.arange(0, 64, 2, dtype=torch.float32) / 64)).cos()
    assert (in_fp32 - angles.cos()).abs().max() > 1e-3
