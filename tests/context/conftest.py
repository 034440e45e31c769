"""What the tests of attention over ranks share: random problems, their one-device answers, and one intra-op thread."""

from dataclasses import dataclass

import pytest
import torch

from hydra_dist.attention import Mask, attention
from hydra_dist.context import ContextParallel, run_ranks
from hydra_dist.context.ring import Ring


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Problem:
    """One attention over a whole sequence, and the mask it is under."""

    sequence_length: int = 67
    batch_size: int = 2
    num_query_heads: int = 4
    num_key_heads: int = 2
    head_dim: int = 8
    causal: bool = True
    window: int | None = None
    documents: tuple[tuple[int, ...], ...] | None = None
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def inputs(self):
        """q, k, v and the gradient of the output; drawn in fp64, so that all dtypes see one problem."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = (self.num_query_heads, self.num_key_heads, self.num_key_heads, self.num_query_heads)
        return [
            torch.randn(
                self.batch_size, self.sequence_length, n, self.head_dim, generator=generator, dtype=torch.float64
            ).to(self.dtype)
            for n in heads
        ]

    def document_starts(self):
        if self.documents is None:
            return None
        starts = torch.zeros(self.batch_size, self.sequence_length, dtype=torch.int64)
        for row, positions in enumerate(self.documents):
            for position in positions:
                starts[row, position:] = position
        return starts


def _whole(problem, backend="reference", dtype=None):
    """Output and gradients of q, k, v on one device."""
    q, k, v, grad_out = (x.to(dtype or problem.dtype) for x in problem.inputs())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask = Mask(causal=problem.causal, window=problem.window, document_starts=problem.document_starts())
    out, _ = attention(*leaves, mask=mask, backend=backend)
    out.backward(grad_out)
    return [out.detach(), *(x.grad for x in leaves)]


def _over_ranks(
    problem, ranks, layout="zigzag", logit_bound=None, *, strategy="ring", inner_ring=None, rotates=None, dealing=None
):
    """The same over emulated ranks, gathered on rank 0, and every rank's stats before gathering.

    Args:
        ranks: P, or (ring, ulysses).
        rotates: what goes around in a ring's backward pass; None: what the ring chooses.
        dealing: of the ranks of the ring, in the place of the layout.
    """
    if strategy == "ulysses" and isinstance(ranks, int):
        ranks = (1, ranks)

    def one_rank(mesh):
        context = ContextParallel(mesh, strategy, layout, inner_ring=inner_ring)
        seq = context.plan(problem.sequence_length, problem.document_starts(), dealing=dealing)
        if rotates is not None and isinstance(seq.strategy, Ring):
            seq.strategy.backward_rotates = rotates
        *qkv, grad_out = (seq.shard(x, 1) for x in problem.inputs())
        leaves = [x.requires_grad_() for x in qkv]
        out = seq.attention(*leaves, causal=problem.causal, window=problem.window, logit_bound=logit_bound)
        out.backward(grad_out)
        stats = seq.stats()
        return [seq.unshard(x, 1).detach() for x in (out, *(x.grad for x in leaves))], stats

    results = run_ranks(ranks, one_rank, timeout=60)
    return results[0][0], [stats for _, stats in results]


def _errors(found, wanted):
    """max |a - b| / max |b| of each tensor; infinite where one is not finite, so that max() does not overlook it."""

    def error(a, b):
        assert a.shape == b.shape
        relative = (a.double() - b.double()).abs().max() / b.double().abs().max()
        return float(relative) if torch.isfinite(relative) else float("inf")

    return [error(a, b) for a, b in zip(found, wanted, strict=True)]


@pytest.fixture
def problem():
    return Problem


@pytest.fixture
def whole():
    return _whole


@pytest.fixture
def over_ranks():
    return _over_ranks


@pytest.fixture
def errors():
    return _errors
