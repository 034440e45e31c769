"""What the prologue's kernels refuse, how their work is dealt, and which tiling a chip gets."""

import pytest
import torch

from hydra_dist.kernels import ccgqa_prologue_forward, ccgqa_prologue_workspace
from hydra_dist.kernels.ccgqa_prologue_rows import DTYPES, deal, padded, refuses, tiling_for
from hydra_dist.kernels.specialization import CHIPS


def test_work_is_dealt_evenly():
    assert deal(1000, 100, ((8, 5), (2, 10))) == (8, 16)
    assert deal(3, 100, ((8, 5), (2, 10))) == (3, 3)
    assert deal(1000, 4, ((8, 5), (2, 1))) == (1, 1)


def test_what_the_kernels_refuse(device, half_dtypes):
    for dtype in (torch.float32, *half_dtypes):
        assert refuses(device, dtype, 128, (2, 2), 2) is None
    for reason, arguments in {
        "not float64": (torch.float64, 128),
        "head_dim up to 256, not 258": (torch.float32, 258),
        "head_dim up to 256, not 15": (torch.float32, 15),
        "in 1 or 2 runs of consecutive positions, not 3": (torch.float32, 64, (2, 2), 3),
        "(0, 2) is not two positive numbers": (torch.float32, 64, (0, 2)),
    }.items():
        assert reason in (refuses(device, *arguments) or "")
    assert (refuses(device, torch.bfloat16, 64) is None) == (torch.bfloat16 in half_dtypes)


@pytest.mark.parametrize(
    ("width", "chunks", "half", "reason"),
    [
        (80, (5,), 8, None),
        (81, (5,), 8, "the projection has 81 channels; 80 follow from the heads"),
        (80, (5, 1), 8, r"chunk_lengths \(5, 1\) do not add up to 5 rows"),
        (80, (5,), 9, "a rotation of 2 x 9 channels does not fit into head_dim 16"),
    ],
)
def test_inputs_that_do_not_fit_together(device, width, chunks, half, reason):
    p, angles = torch.zeros(1, 5, width, device=device), torch.zeros(5, 1, half, device=device)
    nothing = (None,) * 5
    settings = {"num_query_heads": 3, "num_key_heads": 1, "head_dim": 16, "kernel_sizes": (1, 1), "use_qk_mean": False}

    def call():
        return ccgqa_prologue_forward.forward(
            p, None, None, None, chunks, *nothing, angles, angles, **settings, eps=1.0, value_shift=True
        )

    if reason is None:
        q, _, _, inv = call()
        assert not q.any()
        assert bool((inv == 1).all())
    else:
        with pytest.raises(ValueError, match=reason):
            call()


def test_every_chip_has_a_tiling_for_every_size():
    for table in (ccgqa_prologue_forward.TILINGS, ccgqa_prologue_workspace.TILINGS):
        sizes = {(dtype.itemsize, padded(head_dim)) for dtype in DTYPES for head_dim in range(2, 257, 2)}
        assert {key[1:] for key in table if key[0] == "sm_90"} == sizes
        for chip in CHIPS:
            for dtype in DTYPES:
                tiling = tiling_for(table, chip, dtype, 96)
                assert tiling == table.get((chip, dtype.itemsize, 128), table["sm_90", dtype.itemsize, 128])
