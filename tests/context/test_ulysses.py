"""Rows exchanged for heads, and heads for rows."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from hydra_dist.context import ContextParallel, run_ranks, ulysses
from hydra_dist.context.ulysses import HeadExchange

LENGTH = 23


def tagged(heads, batch=2):
    """[B, S, H, 2]: each element says its position and head."""
    positions = torch.arange(LENGTH, dtype=torch.float64).view(1, -1, 1, 1)
    head = torch.arange(heads, dtype=torch.float64).view(1, 1, -1, 1)
    return torch.cat([positions + 0 * head, 0 * positions + head], 3).expand(batch, -1, -1, -1).contiguous()


@pytest.mark.parametrize("ranks,heads", [(1, 4), (2, 4), (4, 4), (4, 8), (4, 2), (4, 1), (3, 3)])
def test_each_rank_gets_its_heads_of_all_rows_and_gives_them_back(ranks, heads):
    x = tagged(heads)

    def one_rank(mesh):
        seq = ContextParallel(mesh, "ulysses").plan(LENGTH)
        (mine,) = seq.heads.to_heads([seq.shard(x, 1)], "forward")
        (back,) = seq.heads.to_rows([mine], [heads], "backward")
        return mine, back, seq.shard(x, 1)

    copies = max(1, ranks // heads)
    for rank, (mine, back, local) in enumerate(run_ranks((1, ranks), one_rank)):
        width = max(1, heads // ranks)
        first = rank * heads // ranks
        assert torch.equal(mine, x[:, :, first : first + width])
        assert torch.equal(back, copies * local)  # as many ranks as have a head add it


@pytest.mark.parametrize("ranks,heads", [(2, (4, 2, 2)), (4, (8, 2, 2)), (4, (4, 1, 1)), (3, (6, 3, 3))])
def test_backward_is_the_transpose(ranks, heads):
    generator = torch.Generator().manual_seed(0)
    wholes = [torch.randn(2, LENGTH, H, 5, generator=generator, dtype=torch.float64) for H in heads]

    def one_rank(mesh):
        seq = ContextParallel(mesh, "ulysses").plan(LENGTH)
        leaves = [seq.shard(x, 1).requires_grad_() for x in wholes]
        mine = torch.ops.hydra_dist.rows_to_heads(leaves, seq.handle, LENGTH, ranks, False)
        weights = [torch.randn(x.shape, dtype=torch.float64) * (1 + mesh.rank) for x in mine]
        sum((x * w).sum() for x, w in zip(mine, weights, strict=True)).backward()
        there = sum(float((x.detach() * w).sum()) for x, w in zip(mine, weights, strict=True))
        back = sum(float((x.detach() * x.grad).sum()) for x in leaves)

        wide = [w.clone().requires_grad_() for w in weights]
        rows = torch.ops.hydra_dist.heads_to_rows(wide, seq.handle, list(heads), seq.geometry.local_length, False)
        sum((x * leaf.detach()).sum() for x, leaf in zip(rows, leaves, strict=True)).backward()
        assert all(torch.equal(w.grad, x) for w, x in zip(wide, mine, strict=True))
        return there, back

    # The sum over ranks of <exchanged x, w> is that of <x, exchanged back w>.
    there, back = map(sum, zip(*run_ranks((1, ranks), one_rank), strict=True))
    assert abs(there - back) < 1e-10 * abs(there) + 1e-10


def test_a_tensor_on_which_nothing_depends_still_takes_part():
    def one_rank(mesh):
        seq = ContextParallel(mesh, "ulysses").plan(LENGTH)
        leaves = [seq.shard(tagged(4), 1).requires_grad_() for _ in range(2)]
        first, _ = torch.ops.hydra_dist.rows_to_heads(leaves, seq.handle, LENGTH, 2, False)
        first.sum().backward()
        return [leaf.grad for leaf in leaves]

    for used, unused in run_ranks((1, 2), one_rank):
        assert torch.equal(used, torch.ones_like(used))
        assert torch.equal(unused, torch.zeros_like(unused))


def test_dtypes_may_differ_in_one_exchange():
    def one_rank(mesh):
        seq = ContextParallel(mesh, "ulysses").plan(LENGTH)
        x = seq.shard(tagged(4), 1)
        found = seq.heads.to_heads([x.to(torch.bfloat16), x, x.float()], "forward")
        assert [y.dtype for y in found] == [torch.bfloat16, torch.float64, torch.float32]
        assert all(torch.equal(y.double(), found[1]) for y in found)
        return seq.stats()["forward"]

    for sent in run_ranks((1, 2), one_rank):
        assert (sent["hops"], sent["messages"]) == (1, 3)
        assert set(sent["kinds"]) == {"heads"}


def test_copies_of_a_head_are_added_in_fp32():
    # 1 + 2^-9 rounds to 1 in bf16: in bf16 what the other ranks give would be lost.
    parts = torch.tensor([1.0, *[2.0**-9] * 7])

    def one_rank(mesh):
        seq = ContextParallel(mesh, "ulysses").plan(16)
        mine = torch.full((1, 16, 1, 1), float(parts[mesh.rank]), dtype=torch.bfloat16)
        return seq.heads.to_rows([mine], [1], "backward")[0]

    for found in run_ranks((1, 8), one_rank):
        assert found.dtype == torch.float32
        assert torch.equal(found, torch.full_like(found, float(parts.sum())))


@pytest.mark.parametrize("ranks", [1, 4])
def test_what_a_compiler_is_told_is_what_comes(ranks):
    def one_rank(mesh):
        seq = ContextParallel(mesh, "ulysses").plan(LENGTH)
        local, rows = [seq.shard(tagged(H), 1) for H in (8, 2)], seq.geometry.local_length

        def there_and_back(tensors):
            mine = torch.ops.hydra_dist.rows_to_heads(tensors, seq.handle, LENGTH, ranks, False)
            return [*mine, *torch.ops.hydra_dist.heads_to_rows(mine, seq.handle, [8, 2], rows, False)]

        real = there_and_back(local)
        with FakeTensorMode() as mode:
            fake = there_and_back([mode.from_tensor(x) for x in local])
        return [(tuple(x.shape), x.dtype) for x in real], [(tuple(x.shape), x.dtype) for x in fake]

    assert all(real == fake for real, fake in run_ranks((1, ranks), one_rank))


def test_the_operators_pass_pytorchs_own_checks():
    seq = ContextParallel().plan(LENGTH)
    leaves = [torch.randn(2, LENGTH, H, 3, requires_grad=True) for H in (4, 2)]
    torch.library.opcheck(torch.ops.hydra_dist.rows_to_heads.default, (leaves, seq.handle, LENGTH, 1, False))
    torch.library.opcheck(torch.ops.hydra_dist.heads_to_rows.default, (leaves, seq.handle, [4, 2], LENGTH, False))


def test_the_comparison_rejects_gradients_of_copies_that_are_not_added(problem, whole, over_ranks, errors, monkeypatch):
    case = problem(num_query_heads=8, num_key_heads=2)
    for strategy, ranks in (("ulysses", 4), ("hybrid", (2, 4))):
        assert max(errors(over_ranks(case, ranks, strategy=strategy)[0], whole(case))) < 1e-12
    monkeypatch.setattr(ulysses, "_added", lambda parts: parts[0])
    for strategy, ranks in (("ulysses", 4), ("hybrid", (2, 4))):
        out, *gradients = errors(over_ranks(case, ranks, strategy=strategy)[0], whole(case))
        assert out < 1e-12
        assert max(gradients) > 1e-2


def test_the_comparison_rejects_heads_dealt_in_turn(problem, whole, over_ranks, errors, monkeypatch):
    # Query head h reads key head h // group, so neighbouring query heads must go together.
    def in_turn(num_heads, rank, size):
        return slice(rank, None, size) if num_heads >= size else slice(rank % num_heads, rank % num_heads + 1)

    monkeypatch.setattr(ulysses, "_dealt", in_turn)
    case = problem(num_query_heads=8, num_key_heads=4)
    assert max(errors(over_ranks(case, 2, strategy="ulysses")[0], whole(case))) > 1e-2


def test_the_comparison_rejects_rows_in_the_order_of_another_length(problem, whole, over_ranks, errors, monkeypatch):
    make = HeadExchange.__init__

    def reversed_lengths(self, transport, lengths):
        make(self, transport, lengths)
        self.lengths = self.lengths[::-1] if len(self.lengths) > 1 and self.lengths[0] != self.lengths[-1] else lengths

    case = problem()
    assert max(errors(over_ranks(case, 2, strategy="ulysses")[0], whole(case))) < 1e-12
    monkeypatch.setattr(HeadExchange, "__init__", reversed_lengths)
    with pytest.raises(RuntimeError):
        over_ranks(case, 2, strategy="ulysses")
