"""The two convolutions against torch's own, and the rows put before chunks and dropped again."""

import pytest
import torch
from torch.nn import functional

from hydra_dist.model.convolution import CausalConvolutions, drop_rows_between, with_rows_before


def torchs_own(convs, z):
    """Conv1d twice, over z [B, T, C] that already has the rows before it."""
    heads, dim, (_, k1) = convs.num_heads, convs.head_dim, convs.kernel_sizes
    u = functional.conv1d(z.mT, convs.depthwise_weight.unsqueeze(1), convs.depthwise_bias, groups=heads * dim)
    weight = convs.grouped_weight.view(heads, k1, dim, dim).permute(0, 3, 2, 1).reshape(heads * dim, dim, k1)
    return functional.conv1d(u, weight, convs.grouped_bias.flatten(), groups=heads).mT.unflatten(-1, (heads, dim))


@pytest.mark.parametrize("kernel_sizes", [(1, 1), (1, 3), (2, 2), (3, 1), (4, 4)])
def test_equal_torchs_convolutions(kernel_sizes, randomize, relative_error):
    convs = randomize(CausalConvolutions(3, 4, kernel_sizes))
    z = torch.randn(2, 11, 12, dtype=torch.float64, requires_grad=True)
    ours, theirs = convs(z), torchs_own(convs, z)
    assert relative_error(ours, theirs) < 1e-13
    weights = torch.randn(ours.shape, dtype=torch.float64)
    inputs = [z, *convs.parameters()]
    grads = torch.autograd.grad((ours * weights).sum(), inputs)
    for a, b in zip(grads, torch.autograd.grad((theirs * weights).sum(), inputs), strict=True):
        assert relative_error(a, b) < 1e-13


def test_low_precision_matches_torchs_convolutions_as_well(randomize):
    convs = randomize(CausalConvolutions(3, 16, (2, 2))).bfloat16()
    z = torch.randn(2, 30, 48).bfloat16()
    exact = torchs_own(convs.double(), z.double())
    convs.bfloat16()
    with torch.no_grad():
        ours, theirs = ((y.double() - exact).square().mean().sqrt() for y in (convs(z), torchs_own(convs, z)))
    assert ours <= 1.15 * theirs


def test_chunks_of_unequal_length_do_not_see_each_other(randomize, relative_error):
    convs = randomize(CausalConvolutions(2, 4, (3, 2)))
    whole = torch.randn(2, 20, 8, dtype=torch.float64)
    expected = convs(functional.pad(whole, (0, 0, 3, 0)))
    chunks, lengths = [(0, 5), (13, 14), (14, 20)], [5, 1, 6]
    padded = functional.pad(whole, (0, 0, 3, 0))
    rows = torch.cat([whole[:, a:b] for a, b in chunks], dim=1)
    before = torch.stack([padded[:, a : a + 3] for a, _ in chunks], dim=1)
    ours = drop_rows_between(convs(with_rows_before(rows, before, lengths)), 3, lengths)
    wanted = torch.cat([expected[:, a:b] for a, b in chunks], dim=1)
    assert relative_error(ours, wanted) < 1e-14
    concatenated = convs(functional.pad(rows, (0, 0, 3, 0)))
    assert relative_error(concatenated, wanted) > 0.1


def test_rows_before_and_between_invert_each_other():
    rows = torch.randn(2, 9, 3)
    lengths = [4, 1, 4]
    before = torch.randn(2, 3, 2, 3)
    longer = with_rows_before(rows, before, lengths)
    assert longer.shape == (2, 15, 3)
    assert torch.equal(drop_rows_between(longer[:, 2:], 2, lengths), rows)
