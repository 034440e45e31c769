"""What a user gets for input that cannot be, and what the other ranks get when one fails or falls silent."""

import contextlib
import re
import time

import pytest
import torch

from hydra_dist.attention import attention
from hydra_dist.context import ContextParallel, TransportTimeoutError, run_ranks
from hydra_dist.errors import ConfigError

GRIDS = {"ring": (4, 1), "all_gather": (4, 1), "ulysses": (1, 4), "hybrid": (2, 2)}


def qkv(seq, dtype=torch.float32, heads=(4, 2, 2)):
    return [torch.randn(1, seq.geometry.local_length, H, 8, dtype=dtype) for H in heads]


@pytest.mark.parametrize(
    "heads,ranks,works",
    [((8, 2), 3, "1 or 2 or 4 or 8"), ((8, 2), 16, "1 or 2 or 4 or 8"), ((6, 3), 4, "1 or 3 or 6"), ((8, 8), 16, "8")],
)
def test_ulysses_beyond_what_replication_allows(heads, ranks, works):
    def one_rank(mesh):
        seq = ContextParallel(mesh, "ulysses").plan(64)
        seq.attention(*qkv(seq, heads=(heads[0], heads[1], heads[1])))

    with pytest.raises(ConfigError, match=rf"context\.ulysses_size {ranks}: {heads[0]} query heads .*{works} works"):
        run_ranks((1, ranks), one_rank)


@pytest.mark.parametrize(
    "strategy,grid,works", [("ring", (2, 2), "4 x 1"), ("all_gather", (1, 4), "4 x 1"), ("ulysses", (4, 1), "1 x 4")]
)
def test_a_mesh_that_does_not_fit_and_the_suggestions_that_do(strategy, grid, works):
    with pytest.raises(ConfigError, match=rf"context\.strategy {strategy} .*a mesh of {works}.* or hybrid on this one"):
        run_ranks(grid, lambda mesh: ContextParallel(mesh, strategy))
    run_ranks(tuple(map(int, works.split(" x "))), lambda mesh: ContextParallel(mesh, strategy).plan(64))
    run_ranks(grid, lambda mesh: ContextParallel(mesh, "hybrid").plan(64))


@pytest.mark.parametrize("inner", [0, 3, 8])
def test_an_inner_ring_that_does_not_divide(inner):
    with pytest.raises(ConfigError, match=rf"context\.inner_ring {inner} does not divide the 4 .*1 or 2 or 4 works"):
        run_ranks(4, lambda mesh: ContextParallel(mesh, inner_ring=inner))


@pytest.mark.parametrize(
    "dealing,message",
    [
        ([[range(3)], [range(4, 8)]], r"each of the positions 0\.\.7 to one rank"),
        ([[range(5)], [range(4, 8)]], r"each of the positions 0\.\.7 to one rank"),
        ([[range(4)], [range(4, 9)]], r"each of the positions 0\.\.7 to one rank"),
        ([[range(8)], []], "rows to every rank.*rank 1"),
        ([[range(8)], [range(3, 3)]], "rows to every rank.*rank 1"),
        ([[range(6, 8), range(2)], [range(2, 6)]], "ascending ranges with a stride of 1; rank 0 has"),
        ([[range(0, 8, 2)], [range(1, 8, 2)]], "ascending ranges with a stride of 1; rank 0 has"),
        ([[range(8)]], "a dealing for 1 ranks, and the ring has 2"),
        ([[range(2)], [range(2, 4)], [range(4, 8)]], "a dealing for 3 ranks, and the ring has 2"),
    ],
    ids=[
        "hole",
        "overlap",
        "too far",
        "empty rank",
        "empty chunk",
        "not ascending",
        "with a stride",
        "too few ranks",
        "too many ranks",
    ],
)
def test_dealings_that_are_none(dealing, message):
    with pytest.raises(ValueError, match=message):
        run_ranks(2, lambda mesh: ContextParallel(mesh).plan(8, dealing=dealing))


def test_more_ranks_in_a_ulysses_group_than_rows():
    def one_rank(mesh, length):
        return ContextParallel(mesh, "hybrid", "contiguous").plan(length)

    with pytest.raises(ConfigError, match="4 ranks share 3 rows of a sequence of 7; a sequence of 16 or more works"):
        run_ranks((2, 4), lambda mesh: one_rank(mesh, 7))
    run_ranks((2, 4), lambda mesh: one_rank(mesh, 16))


@pytest.mark.parametrize("strategy", GRIDS)
def test_local_tensors_of_a_wrong_length(strategy):
    def one_rank(mesh, wrong):
        seq = ContextParallel(mesh, strategy).plan(64)
        tensors = qkv(seq)
        tensors[wrong] = tensors[wrong][:, :-1]
        seq.attention(*tensors)

    with pytest.raises(ValueError, match="q has 15 rows and this rank holds 16 of 64"):
        run_ranks(GRIDS[strategy], lambda mesh: one_rank(mesh, 0))
    with pytest.raises(ValueError, match="k"):
        run_ranks(GRIDS[strategy], lambda mesh: one_rank(mesh, 1))
    with pytest.raises(ValueError, match="v"):
        run_ranks(GRIDS[strategy], lambda mesh: one_rank(mesh, 2))


@pytest.mark.parametrize("strategy", GRIDS)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32, torch.float64),
        (torch.int64,) * 3,
        (torch.int32, torch.float32, torch.float32),
        (torch.bool,) * 3,
    ],
    ids=str,
)
def test_dtypes_that_do_not_fit_are_refused_on_every_rank(strategy, dtypes):
    def one_rank(mesh):
        seq = ContextParallel(mesh, strategy).plan(64)
        tensors = [torch.ones(x.shape).to(dtype) for x, dtype in zip(qkv(seq), dtypes, strict=True)]
        try:
            seq.attention(*tensors)
        except (ValueError, ConfigError) as error:
            return str(error)
        return "nothing was refused"

    for message in run_ranks(GRIDS[strategy], one_rank, timeout=5):
        assert any(str(dtype) in message for dtype in dtypes), message


@pytest.mark.parametrize("rotates", ["keys", "queries"])
@pytest.mark.parametrize("strategy", GRIDS)
def test_tensors_that_are_not_contiguous_work(strategy, rotates):
    generator = torch.Generator().manual_seed(0)
    # [B, H, D, S]: rows are the fastest dimension, and batch rows lie between them.
    wholes = [torch.randn(2, H, 8, 64, generator=generator, dtype=torch.float64) for H in (4, 2, 2, 4)]

    def one_rank(mesh):
        seq = ContextParallel(mesh, strategy).plan(64)
        seq.strategy.backward_rotates = rotates
        local = [seq.shard(x, 3).permute(0, 3, 1, 2) for x in wholes]
        assert not any(x.is_contiguous() for x in local)
        *leaves, grad_out = local
        leaves = [x.requires_grad_() for x in leaves]
        out = seq.attention(*leaves)
        out.backward(grad_out)
        return [seq.unshard(x, 1).detach() for x in (out, *(leaf.grad for leaf in leaves))]

    leaves = [x.permute(0, 3, 1, 2).contiguous().requires_grad_() for x in wholes[:3]]
    out, _ = attention(*leaves, backend="reference")
    out.backward(wholes[3].permute(0, 3, 1, 2))
    wanted = [out.detach(), *(leaf.grad for leaf in leaves)]
    for found in run_ranks(GRIDS[strategy], one_rank):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


class LostError(Exception):
    """What goes wrong on a rank."""


@pytest.mark.parametrize("when", ["before", "between", "backward"])
@pytest.mark.parametrize("strategy", GRIDS)
def test_a_rank_that_raises_is_named_and_the_others_are_released(strategy, when):
    def one_rank(mesh):
        def fail(stage):
            if mesh.rank == 2 and stage == when:
                raise LostError(stage)

        seq = ContextParallel(mesh, strategy).plan(64)
        q, k, v = (x.requires_grad_() for x in qkv(seq))
        fail("before")
        exchange = seq.strategy.backward

        def backward(*args, **kwargs):
            fail("backward")
            return exchange(*args, **kwargs)

        seq.strategy.backward = backward
        out = seq.attention(q, k, v)
        fail("between")
        out.sum().backward()

    begin = time.monotonic()
    with pytest.raises(LostError, match=when) as caught:
        run_ranks(GRIDS[strategy], one_rank, timeout=60)
    assert "raised by emulated rank 2 of 4" in caught.value.__notes__
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("strategy", GRIDS)
@pytest.mark.parametrize("backward", [False, True])
def test_a_rank_that_never_sends_is_named_within_the_time(strategy, backward):
    said = {}

    def one_rank(mesh):
        seq = ContextParallel(mesh, strategy, timeout=0.5).plan(64)
        tensors = [x.requires_grad_() for x in qkv(seq)]
        if mesh.rank == 1 and not backward:
            return
        begin = time.monotonic()
        try:
            out = seq.attention(*tensors, causal=False)
            if mesh.rank != 1:
                begin = time.monotonic()
                out.sum().backward()
        except TransportTimeoutError as error:
            said[mesh.rank] = str(error), time.monotonic() - begin

    with contextlib.suppress(RuntimeError):  # messages to the silent rank are left over
        run_ranks(GRIDS[strategy], one_rank, timeout=60)
    # Rank 2 follows rank 1 in the ring; in a Ulysses group and where keys are gathered rank 0 waits for it too.
    witness, group = {"ring": (2, "ring"), "all_gather": (0, "ring")}.get(strategy, (0, "ulysses"))
    message, seconds = said[witness]
    kind = "heads" if group == "ulysses" else "keys"
    expected = (
        rf"emulated {group}[ 0]* rank {witness} waited 0\.5 s for emulated {group}[ 0]* rank 1 "
        rf"\({'backward' if backward else 'forward'} {kind}\), which sent nothing"
    )
    assert re.match(expected, message), message
    assert 0.5 <= seconds < 10


@pytest.mark.parametrize("strategy", GRIDS)
def test_a_run_in_which_a_rank_never_sends_ends(strategy):
    def one_rank(mesh):
        seq = ContextParallel(mesh, strategy, timeout=0.5).plan(64)
        if mesh.rank != 1:
            seq.attention(*qkv(seq), causal=False)

    begin = time.monotonic()
    with pytest.raises(TransportTimeoutError, match=r"waited 0\.5 s for emulated .* \(forward "):
        run_ranks(GRIDS[strategy], one_rank, timeout=60)
    assert time.monotonic() - begin < 10
