"""What the tests of attention over ranks share: random problems, their one-device answers, and one intra-op thread."""

from dataclasses import dataclass

import pytest
import torch

from hydra_dist.attention import Mask, attention
from hydra_dist.context import ContextParallel, run_ranks


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


def _over_ranks(problem, num_ranks, layout="zigzag", logit_bound=None):
    """The same over emulated ranks, gathered on rank 0, and every rank's stats before gathering."""

    def one_rank(mesh):
        seq = ContextParallel(mesh, layout=layout).plan(problem.sequence_length, problem.document_starts())
        *qkv, grad_out = (seq.shard(x, 1) for x in problem.inputs())
        leaves = [x.requires_grad_() for x in qkv]
        out = seq.attention(*leaves, causal=problem.causal, window=problem.window, logit_bound=logit_bound)
        out.backward(grad_out)
        stats = seq.stats()
        return [seq.unshard(x, 1).detach() for x in (out, *(x.grad for x in leaves))], stats

    results = run_ranks(num_ranks, one_rank, timeout=20)
    return results[0][0], [stats for _, stats in results]


def _errors(found, wanted):
    """max |a - b| / max |b| of each tensor."""
    return [
        float((a.double() - b.double()).abs().max() / b.double().abs().max())
        for a, b in zip(found, wanted, strict=True)
    ]


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
