"""What form a mask has, and what one call over it says."""

import pytest
import torch

from hydra_dist.attention import Mask
from hydra_dist.attention.band import Band
from hydra_dist.attention.launch import Launch, launch_of, need_of

STARTS = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 3, 8, 8]])
TEN = torch.arange(10)


@pytest.mark.parametrize(
    ("mask", "lengths", "form", "few", "edges"),
    [
        (Mask(), (10, 10), "square", True, False),
        (Mask(causal=False), (10, 4), "rectangle", True, False),
        (Mask(), (10, 4), "any", True, False),
        (Mask(q_positions=TEN + 90), (10, 90), "rectangle", True, False),  # all keys lie before all queries
        (Mask(q_positions=TEN + 90), (10, 100), "any", True, False),  # a causal square after a full tile
        (Mask(q_positions=TEN + 7, k_positions=TEN + 7), (10, 10), "square", True, False),
        (Mask(window=10), (10, 10), "square", True, False),  # the window is no limit
        (Mask(window=9), (10, 10), "window", False, True),
        (Mask(window=9, q_positions=TEN + 90), (10, 100), "window", False, True),
        (Mask(window=9, q_positions=TEN + 90), (10, 99), "any", False, True),
        (Mask(window=9), (10, 4), "any", False, True),
        (Mask(document_starts=STARTS), (10, 10), "documents", False, False),
        (Mask(causal=False, document_starts=STARTS), (10, 10), "documents", False, False),
        (Mask(window=2, document_starts=STARTS), (10, 10), "documents", False, True),
        (Mask(document_starts=STARTS, k_document_starts=STARTS), (10, 10), "any", False, False),
        (Mask(document_starts=STARTS, q_positions=TEN + 1), (10, 10), "any", False, False),
        (Mask(q_positions=torch.cat([TEN[:5], TEN[6:]])), (9, 10), "any", True, False),
        (Mask(window=3, q_positions=torch.cat([TEN[:5], TEN[6:]])), (9, 10), "any", False, True),
    ],
)
def test_forms(mask, lengths, form, few, edges):
    need = need_of(mask, *lengths)
    assert (need.form, need.few, need.edges) == (form, few, edges)


def test_pairs_of_runs_are_counted():
    assert need_of(Mask(q_positions=torch.tensor([0, 1, 5, 9])), 4, 10).num_span_pairs == 3


def allowed_by(launch, q_length, k_length, batch_size=1):
    """The mask that a launch stands for, with FlashAttention's convention: aligned at the last query and key."""
    left, right = launch.window(q_length, k_length)
    diagonal = torch.arange(q_length)[:, None] + k_length - q_length
    keys = torch.arange(k_length)
    allowed = torch.ones(q_length, k_length, dtype=torch.bool)
    allowed &= (keys >= diagonal - left) | (left < 0)
    allowed &= (keys <= diagonal + right) | (right < 0)
    if launch.documents is None:
        return allowed.expand(batch_size, -1, -1)
    numbers = torch.zeros(batch_size * q_length, dtype=torch.long)
    numbers[launch.documents.offsets[:-1].long()] = 1
    numbers = numbers.cumsum(0).unflatten(0, (batch_size, q_length))
    assert launch.documents.longest == torch.bincount(numbers.flatten()).max()
    return allowed & (numbers[:, :, None] == numbers[:, None])


TWO = torch.cat([STARTS, torch.tensor([[0] * 9 + [9]])])


@pytest.mark.parametrize(
    ("mask", "lengths"),
    [
        (Mask(), (10, 10)),
        (Mask(causal=False), (10, 4)),
        (Mask(q_positions=TEN + 90), (10, 90)),
        (Mask(window=3), (10, 10)),
        (Mask(window=9, q_positions=TEN + 90), (10, 100)),
        (Mask(document_starts=STARTS), (10, 10)),
        (Mask(document_starts=TWO), (10, 10)),
        (Mask(causal=False, document_starts=TWO), (10, 10)),
        (Mask(window=2, document_starts=TWO), (10, 10)),
        (Mask(window=50, document_starts=TWO), (10, 10)),
        (
            Mask(document_starts=torch.tensor([[4, 4, 4, 9, 9]]), q_positions=TEN[:5] + 6, k_positions=TEN[:5] + 6),
            (5, 5),
        ),
    ],
)
def test_a_launch_is_the_mask(mask, lengths):
    q, k = (torch.empty(2, length, 1, 8) for length in lengths)
    launch = launch_of(mask, need_of(mask, *lengths).form, q, k, 0.5)
    assert launch.scale == 0.5
    assert torch.equal(allowed_by(launch, *lengths, 2), mask.allowed(*lengths).expand(2, -1, -1))
    if mask.window is not None and mask.window < 10:
        wrong = launch_of(Mask(**{**vars(mask), "window": mask.window + 1}), "window", q, k, 0.5)
        assert launch.documents is not None or not torch.equal(
            allowed_by(wrong, *lengths), mask.allowed(*lengths).expand(1, -1, -1)
        )


def test_any_mask_goes_as_it_is():
    mask = Mask(window=3)
    launch = launch_of(mask, "any", torch.empty(1, 10, 1, 8), torch.empty(1, 10, 1, 8), 0.5, torch.float32)
    assert launch.mask is mask
    assert launch.out_dtype == torch.float32


def test_contradicting_documents_are_told():
    mask = Mask(document_starts=torch.zeros(1, 5, dtype=torch.long).index_fill(1, torch.tensor([1]), 3))
    with pytest.raises(ValueError, match="the row at position 1 says"):
        launch_of(mask, "documents", torch.empty(1, 5, 1, 8), torch.empty(1, 5, 1, 8), 0.5)


@pytest.mark.parametrize("band", [Band(4, 8, 3, None), Band(4, 8, 3, 2), Band(4, 4, 5, 5)])
def test_bands_that_leave_a_query_without_keys(band):
    with pytest.raises(ValueError, match="the last query must lie"):
        Launch(1.0, band=band).window(band.num_queries, band.num_keys)
