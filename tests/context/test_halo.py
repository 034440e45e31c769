"""The rows before each chunk, against plain slices of the whole tensor."""

import itertools

import pytest
import torch

from hydra_dist.context import ContextParallel, SequencePlan, run_ranks
from hydra_dist.costs.halo import halo_traffic

CASES = list(itertools.product((1, 2, 3, 4, 8), ("zigzag", "contiguous", "balanced"), ("one", "several", "by_row")))
ROWS = (4, 1, 11)  # the last one is wider than most chunks


def document_starts(kind, length):
    if kind == "one":
        return None
    starts = torch.zeros(2, length, dtype=torch.int64)
    for row, positions in enumerate(([5, 6, 20, 33], [1, 2, 3, 30] if kind == "by_row" else [5, 6, 20, 33])):
        for position in positions:
            starts[row, position:] = position  # nothing where the sequence is shorter
    return starts


def plain(x, chunks, rows, starts):
    """[B, chunks, rows, C] by slicing a tensor that is padded with zeros in front."""
    padded = torch.cat([x.new_zeros(x.shape[0], rows, x.shape[2]), x], 1)
    halos = []
    for start in (chunk.start for chunk in chunks):
        halo = padded[:, start : start + rows]
        if starts is not None:
            positions = torch.arange(start - rows, start)
            halo = torch.where((positions >= starts[:, start : start + 1])[:, :, None], halo, 0.0)
        halos.append(halo)
    return torch.stack(halos, 1)


def compare(ranks, layout, kind, length=37):
    """The largest difference of halos and gradients from plain slicing, over all ranks and tensors."""
    starts = document_starts(kind, length)
    whole = [torch.randn(2, length, width, dtype=torch.float64) for width in (3, 5, 2)]
    weights = [
        torch.randn(2, 2 * ranks, rows, x.shape[2], dtype=torch.float64) for x, rows in zip(whole, ROWS, strict=True)
    ]

    def one_rank(mesh):
        seq = ContextParallel(mesh, layout=layout).plan(length, starts)
        leaves = [seq.shard(x, 1).requires_grad_() for x in whole]
        halos = seq.halo(list(zip(leaves, ROWS, strict=True)))
        first = 2 * mesh.rank  # each chunk of each rank has weights of its own
        sum(
            (halo * w[:, first : first + halo.shape[1]]).sum() for halo, w in zip(halos, weights, strict=True)
        ).backward()
        return [halo.detach() for halo in halos], [seq.unshard(x.grad, 1) for x in leaves], seq.geometry.dealing

    results = run_ranks(ranks, one_rank, timeout=20)
    leaves = [x.clone().requires_grad_() for x in whole]
    worst = 0.0
    for index, (x, rows) in enumerate(zip(leaves, ROWS, strict=True)):
        for rank, (halos, _, chunks) in enumerate(results):
            wanted = plain(x, chunks[rank], rows, starts)
            assert halos[index].shape == wanted.shape
            worst = max(worst, float((halos[index] - wanted).detach().abs().max()))
            (wanted * weights[index][:, 2 * rank : 2 * rank + wanted.shape[1]]).sum().backward()
        worst = max(worst, float((results[0][1][index] - x.grad).abs().max()))
    return worst


@pytest.mark.parametrize("ranks,layout,kind", CASES)
def test_halos_and_gradients_equal_plain_slices(ranks, layout, kind):
    assert compare(ranks, layout, kind) < 1e-14


@pytest.mark.parametrize("length", [16, 17, 23])
@pytest.mark.parametrize("kind", ["one", "by_row"])
def test_chunks_of_one_row(length, kind):
    assert compare(8, "zigzag", kind, length) < 1e-14


def test_the_check_rejects_a_halo_that_ignores_documents(monkeypatch):
    monkeypatch.setattr(SequencePlan, "_inside", lambda self, rows, device: None)
    assert compare(4, "zigzag", "one") < 1e-14
    assert compare(4, "zigzag", "several") > 1e-2


def test_the_check_rejects_rows_before_the_chunk_in_memory(monkeypatch):
    def naive(self, parts):
        halos = []
        for x, rows in parts:
            padded = torch.cat([x.new_zeros(x.shape[0], rows, x.shape[2]), x], 1)
            offsets = [0, *itertools.accumulate(self.chunk_lengths[:-1])]
            halos.append(torch.stack([padded[:, offset : offset + rows] for offset in offsets], 1))
        return halos

    monkeypatch.setattr(SequencePlan, "halo", naive)
    assert compare(4, "zigzag", "one") > 1e-2


def test_garbage_outside_of_the_document_does_not_leak():
    starts = document_starts("several", 40)
    x = torch.randn(2, 40, 3)
    x[:, :20] = torch.nan

    def one_rank(mesh):
        seq = ContextParallel(mesh, layout="contiguous").plan(40, starts)
        leaf = seq.shard(x, 1).requires_grad_()
        (halo,) = seq.halo([(leaf, 3)])
        halo.sum().backward()
        return halo.detach(), leaf.grad

    # Rank 1 begins at row 20, where a document begins.
    (_, grad), (halo, _) = run_ranks(2, one_rank)
    assert torch.equal(halo, torch.zeros_like(halo))
    assert torch.equal(grad, torch.zeros_like(grad))


def test_dtypes_travel_together_and_a_tensor_without_gradient_gets_none():
    def one_rank(mesh):
        seq = ContextParallel(mesh).plan(32)
        positions = seq.positions.view(1, -1, 1)
        parts = [
            (positions.to(torch.bfloat16).requires_grad_(), 3),
            (positions.double().requires_grad_(), 1),
            (positions.to(torch.uint8), 5),
            (positions.float(), 0),
        ]
        halos = seq.halo(parts)
        assert [halo.dtype for halo in halos] == [torch.bfloat16, torch.float64, torch.uint8, torch.float32]
        assert halos[3].shape == (1, len(seq.chunk_lengths), 0, 1)
        (halos[0].double().sum() + halos[1].sum()).backward()
        assert parts[2][0].grad is None
        assert parts[0][0].grad.dtype == torch.bfloat16
        starts = [chunk.start for chunk in seq.geometry.local_chunks]
        for halo, rows in zip(halos[:3], (3, 1, 5), strict=True):
            wanted = [[max(0, start - rows + i) for i in range(rows)] for start in starts]
            assert halo[0, :, :, 0].tolist() == wanted
        return seq.stats()

    for stats in run_ranks(2, one_rank):
        assert stats["forward"]["messages"] == stats["backward"]["messages"] == 1


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("length", [37, 800])
def test_bytes_sent_equal_the_closed_form(layout, length):
    def one_rank(mesh):
        seq = ContextParallel(mesh, layout=layout).plan(length)
        z = torch.zeros(3, seq.geometry.local_length, 10, dtype=torch.bfloat16, requires_grad=True)
        v = torch.zeros(3, seq.geometry.local_length, 6, requires_grad=True)
        sum(halo.sum() for halo in seq.halo([(z, 6), (v, 1)])).backward()
        return seq.geometry.dealing, seq.stats()

    results = run_ranks(4, one_rank)
    wanted = halo_traffic(results[0][0], [(6, 20), (1, 24)], batch_size=3)
    for (_, stats), traffic in zip(results, wanted, strict=True):
        forward, backward = stats["forward"], stats["backward"]
        assert (forward["bytes"], forward["messages"]) == (traffic.forward_bytes, traffic.forward_messages)
        assert (backward["bytes"], backward["messages"]) == (traffic.backward_bytes, traffic.backward_messages)


def test_one_device_sends_nothing():
    seq = ContextParallel().plan(8)
    (halo,) = seq.halo([(torch.ones(1, 8, 2), 3)])
    assert torch.equal(halo, torch.zeros(1, 1, 3, 2))
    assert seq.stats()["forward"]["messages"] == 0
    assert seq.halo([]) == []


def test_a_second_derivative_is_refused():
    seq = ContextParallel().plan(8)
    leaf = torch.randn(1, 8, 2, requires_grad=True)
    (halo,) = seq.halo([(leaf, 3)])
    (grad,) = torch.autograd.grad((halo * leaf[:, None, :3]).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="the halo exchange has no second derivative"):
        grad.sum().backward()


def test_wrong_shapes_are_named():
    seq = ContextParallel().plan(8, torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"takes tensors \[batch, rows, channels\]"):
        seq.halo([(torch.zeros(1, 8, 2, 2), 1)])
    with pytest.raises(ValueError, match="has 7 rows and this rank holds 8 of 8"):
        seq.halo([(torch.zeros(2, 7, 2), 1)])
    with pytest.raises(ValueError, match="has 1 batch rows and document_starts has 2"):
        seq.halo([(torch.zeros(1, 8, 2), 1)])
    with pytest.raises(ValueError, match="a halo of -1 rows"):
        seq.halo([(torch.zeros(2, 8, 2), -1)])


def test_the_operator_passes_pytorchs_own_checks():
    seq = ContextParallel().plan(12, document_starts("several", 12))
    leaves = [torch.randn(2, 12, width, requires_grad=True) for width in (3, 2)]
    torch.library.opcheck(torch.ops.hydra_dist.halo.default, (leaves, seq.handle, [3, 1], len(seq.chunk_lengths)))
