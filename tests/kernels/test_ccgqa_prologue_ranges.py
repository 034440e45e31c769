"""The backward over ranges of rows: they are all rows, what it keeps is bounded, and the account of bytes adds up."""

import math
from dataclasses import replace

import pytest
import torch

from hydra_dist.kernels import ccgqa_prologue_bytes as account
from hydra_dist.kernels.ccgqa_prologue_ranges import cut
from hydra_dist.kernels.ccgqa_prologue_rows import Shape
from hydra_dist.kernels.ccgqa_prologue_workspace import TILINGS

LAYER = Shape(8, 2, 128, (2, 2), True, 1e-14, True)
TILING = TILINGS["sm_90", 2, 128]
ROWS = 32_768


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 100, 1000])
@pytest.mark.parametrize("limit", [1, 160, 1000, 10**6])
def test_ranges_are_all_rows_once_and_small(batch_size, num_rows, limit):
    ranges = cut(batch_size, num_rows, 10, limit, 16)
    seen = torch.zeros(batch_size, num_rows, dtype=torch.int64)
    for rows in ranges:
        seen[rows.first_batch : rows.stop_batch, rows.first : rows.stop] += 1
        assert rows.stop == num_rows or rows.stop % 16 == 0
        assert rows.batch_size * (rows.stop - rows.first) * 10 <= max(limit, 160)
    assert bool((seen == 1).all())
    assert [rows.adds for rows in ranges] == [False] + [True] * (len(ranges) - 1)


def test_what_fits_is_one_range():
    assert len(cut(1, 100, 10, 1000, 16)) == 1
    assert len(cut(1, 101, 10, 1000, 16)) == 2
    assert len(cut(6, 100, 10, 2000, 16)) == 3


def test_a_backward_takes_the_same_memory_however_long_the_rows():
    def taken(num_rows, tiling=None):
        return account.temporary_bytes(account.example(LAYER, num_rows, torch.bfloat16, tiling))

    most = TILING.dy_bytes + 2 * LAYER.latent_size * 2
    lengths = (2**16, 2**18, 2**20)
    for num_rows in lengths:
        workspace = account.example(LAYER, num_rows, torch.bfloat16)
        assert workspace.dy.nbytes <= most
        assert taken(num_rows) <= 1.3 * most
    whole = replace(TILING, dy_bytes=2**40)
    assert taken(lengths[-1], whole) > 15 * taken(lengths[0], whole) / 2
    assert taken(lengths[0], whole) > 4 * most


def test_the_account_adds_up():
    found = account.of_backward(LAYER, ROWS, torch.bfloat16, 32, 132)
    latent, values = (ROWS * size * 2 for size in (1280, 256))
    assert account.bound(LAYER, ROWS, 2) == 3 * latent + 2 * values
    dy = [traffic for traffic in found if traffic.tensor == "dy"]
    assert all(traffic.in_cache for traffic in dy)
    assert sum(traffic.read + traffic.written for traffic in dy) == 2 * latent
    large = [traffic for traffic in found if not traffic.tensor.startswith(("sums", "norm's", "dy"))]
    assert account.memory_bytes(tuple(large)) == 4 * latent + 2 * values
    whole = account.of_backward(LAYER, ROWS, torch.bfloat16, 32, 132, replace(TILING, dy_bytes=2**40))
    assert math.isclose(account.memory_bytes(whole), 6 * latent + 2 * values, rel_tol=0.15)
    assert account.memory_bytes(found) < account.memory_bytes(whole)
