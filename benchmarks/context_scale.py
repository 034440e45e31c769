"""Many ranks share a long sequence exactly, and what a rank of a ring holds does not depend on how many there are.

Emulated ranks of one process, each with as many rows, go through causal attention forward and backward in fp32. Of the
largest ring, sampled rows of the output and of the gradients are held against plain softmax attention over these rows
in fp64, and the bytes that every rank sent against their closed form. Memory is the most bytes of tensors alive at once
on a rank, its own rows included. Gathered keys are of the whole sequence, and grow with it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import Options
from benchmarks.result import Cell, Result, Samples, Setting, Table
from benchmarks.tensor_memory import TensorMemory
from benchmarks.uncounted import uncounted
from hydra_dist.context import ContextParallel, EmulatedMesh, run_ranks
from hydra_dist.costs.layout import chunks
from hydra_dist.costs.needs import MaskRule
from hydra_dist.costs.rotation import Heads, ring_traffic
from hydra_dist.costs.traffic import RankTraffic

NEEDS_GPU = False
SETTINGS: dict[str, Setting] = {
    "ranks": "4,16,64",
    "rows": 2048,
    "head_dim": 16,
    "ulysses_heads": 16,
    "sampled": 6,
    "last_keys": 256,
    "largest_output_error": 1e-5,
    "largest_gradient_error": 5e-5,
    "largest_growth": 1.05,
}
"""``rows``: of a rank. The ring and gathered keys have one query and one key head, Ulysses ``ulysses_heads`` of both.
``sampled``: rows of the output; gradients of keys are sampled among the ``last_keys``, which few queries see."""

TIMEOUT = 3600.0
"""Seconds that a rank waits for another one."""
STRATEGIES = ("ring", "all_gather", "ulysses")


@dataclass(frozen=True)
class Rank:
    """What one rank measured."""

    peak_bytes: int
    sent: RankTraffic
    rows: dict[int, tuple[Tensor, ...]]
    """Output, and the gradients of q, k and v, of the positions that were asked for."""


@dataclass(frozen=True)
class Errors:
    """The largest errors of sampled rows, relative to each row: of the output, and of gradients."""

    output: float
    gradient: float


def run(options: Options) -> Result:
    """Measure every strategy on every number of ranks, and sample the largest ring."""
    settings = options.settings
    counts = [int(number) for number in str(settings["ranks"]).split(",")]
    peaks: dict[tuple[str, int], int] = {}
    quantities: dict[str, Samples] = {}
    numbers: dict[str, int] = {}
    rows: list[tuple[Cell, ...]] = []
    errors, sent_as_planned = Errors(float("inf"), float("inf")), False
    for strategy in STRATEGIES:
        heads = int(settings["ulysses_heads"]) if strategy == "ulysses" else 1
        for ranks in counts:
            length = ranks * int(settings["rows"])
            if strategy == "ulysses" and heads % ranks:
                continue
            inputs = random_inputs(length, heads, int(settings["head_dim"]))
            sampled = ([], []) if (strategy, ranks) != ("ring", max(counts)) else samples_of(length, settings)
            started = time.perf_counter()
            measured = measure(strategy, ranks, inputs, [*sampled[0], *sampled[1]])
            seconds = time.perf_counter() - started
            name = f"{strategy}, {ranks} ranks"
            peak = max(rank.peak_bytes for rank in measured)
            peaks[strategy, ranks] = peak
            first = peaks[strategy, counts[0]]
            quantities[f"peak bytes, {name}"] = Samples.of([rank.peak_bytes for rank in measured], "bytes")
            quantities[f"seconds, {name}"] = Samples.of([seconds], "s")
            most = max(rank.sent.forward_bytes + rank.sent.backward_bytes for rank in measured)
            numbers[f"bytes sent by the rank that sent most, {name}"] = most
            rows.append((strategy, ranks, length, heads, peak, peak / first, most, seconds))
            growth = f"{peak / first:.3f} times what {counts[0]} ranks hold"
            options.say(f"{name}, {length:,} tokens: {peak:,} bytes a rank, {growth}; {seconds:.0f} s")
            if sampled[0]:
                errors = compare(measured, inputs, *sampled)
                sent_as_planned = [rank.sent for rank in measured] == closed_form(ranks, length, inputs[1])
    grown = peaks["ring", max(counts)] / peaks["ring", counts[0]]
    exact = errors.output <= float(settings["largest_output_error"]) and errors.gradient <= float(
        settings["largest_gradient_error"]
    )
    length = max(counts) * int(settings["rows"])
    return Result(
        holds=exact and sent_as_planned and grown <= float(settings["largest_growth"]),
        finding=f"from {counts[0]} to {max(counts)} ranks a rank of the ring holds {grown:.3f} times the bytes (bound "
        f"{settings['largest_growth']}); over {max(counts)} ranks and {length:,} tokens sampled rows differ from "
        f"softmax in fp64 by {errors.output:.1e} of the row (bound {settings['largest_output_error']}), their "
        f"gradients by {errors.gradient:.1e} (bound {settings['largest_gradient_error']}), and what was sent is "
        f"{'' if sent_as_planned else 'NOT '}the closed form's",
        quantities=quantities,
        counts=numbers,
        table=Table(
            columns=("strategy", "ranks", "tokens", "heads", "bytes on a rank", "growth", "bytes it sent", "seconds"),
            rows=tuple(rows),
        ),
    )


def random_inputs(length: int, heads: int, head_dim: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, [1, S, heads, head_dim] in fp32."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, length, heads, head_dim, generator=generator) for _ in range(4)]


def samples_of(length: int, settings: Mapping[str, Setting]) -> tuple[list[int], list[int]]:
    """Positions of queries all over the sequence but its first, whose gradient is 0, and of keys at its end."""
    number, last = int(settings["sampled"]), int(settings["last_keys"])
    queries = sorted({1 + (length - 2) * index // (number - 1) for index in range(number)})
    keys = sorted({length - 1 - (last - 1) * index // (number - 1) for index in range(number)})
    return queries, keys


def measure(strategy: str, ranks: int, inputs: Sequence[Tensor], positions: Sequence[int]) -> list[Rank]:
    """Attention forward and backward on every rank."""
    wanted = torch.tensor(positions, dtype=torch.int64)

    def one_rank(mesh: EmulatedMesh) -> Rank:
        context = ContextParallel(uncounted(mesh), strategy)
        with TensorMemory() as memory:
            seq = context.plan(inputs[0].shape[1])
            q, k, v, grad_out = (seq.shard(x, 1) for x in inputs)
            leaves = [x.requires_grad_() for x in (q, k, v)]
            out = seq.attention(q, k, v)
            out.backward(grad_out)
        found = [x for x in (out.detach(), *(leaf.grad for leaf in leaves)) if x is not None]
        rows = {
            int(seq.positions[row]): tuple(x[0, row].clone() for x in found)
            for row in torch.isin(seq.positions, wanted).nonzero().flatten().tolist()
        }
        ways = seq.stats()
        return Rank(
            memory.peak_bytes,
            RankTraffic(*(ways[way][what] for way in ("forward", "backward") for what in ("bytes", "messages"))),
            rows,
        )

    return run_ranks((1, ranks) if strategy == "ulysses" else ranks, one_rank, timeout=TIMEOUT)


def closed_form(ranks: int, length: int, k: Tensor) -> list[RankTraffic]:
    """What each rank of a ring should send."""
    heads = Heads(k.shape[2], k.shape[2], k.shape[3])
    dealing = chunks("zigzag", length, ranks)
    return ring_traffic(dealing, MaskRule(causal=True), heads, batch_size=1, element_bytes=k.element_size())


def compare(measured: Sequence[Rank], inputs: Sequence[Tensor], queries: Sequence[int], keys: Sequence[int]) -> Errors:
    """Sampled rows against plain attention in fp64."""
    rows = {position: tensors for rank in measured for position, tensors in rank.rows.items()}
    of_rows = plain_rows(inputs, queries)
    output = _largest([rows[position][0] for position in queries], [out for out, _ in of_rows])
    grad_q = _largest([rows[position][1] for position in queries], [grad for _, grad in of_rows])
    of_keys = plain_key_gradients(inputs, keys)
    grads = [_largest([rows[p][2 + i] for p in keys], [grad[i] for grad in of_keys]) for i in range(2)]
    return Errors(output, max(grad_q, *grads))


def plain_rows(inputs: Sequence[Tensor], positions: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Of each position the output and the gradient of q, [heads, head_dim] in fp64."""
    found = []
    for position in positions:
        q, grad = (inputs[index][0, position].double() for index in (0, 3))
        k, v = (inputs[index][0, : position + 1].double() for index in (1, 2))
        weights = torch.einsum("hd,khd->hk", q / q.shape[-1] ** 0.5, k).softmax(-1)
        out = torch.einsum("hk,khd->hd", weights, v)
        rises = weights * (torch.einsum("hd,khd->hk", grad, v) - (grad * out).sum(-1, keepdim=True))
        found.append((out, torch.einsum("hk,khd->hd", rises, k) / q.shape[-1] ** 0.5))
    return found


def plain_key_gradients(inputs: Sequence[Tensor], positions: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Of each position the gradients of k and v, [heads, head_dim] in fp64: sums over the queries that see it."""
    scale, length = inputs[0].shape[-1] ** -0.5, inputs[0].shape[1]
    zero = torch.zeros_like(inputs[1][0, 0], dtype=torch.float64)
    sums = {position: (zero.clone(), zero.clone()) for position in positions}
    for query in range(min(positions), length):
        q, grad = (inputs[index][0, query].double() for index in (0, 3))
        k, v = (inputs[index][0, : query + 1].double() for index in (1, 2))
        weights = (torch.einsum("hd,khd->hk", q, k) * scale).softmax(-1)
        out = torch.einsum("hk,khd->hd", weights, v)
        for position in positions:
            if position <= query:
                weight = weights[:, position, None]
                rise = weight * ((grad * v[position]).sum(-1, keepdim=True) - (grad * out).sum(-1, keepdim=True))
                sums[position][0].add_(rise * q * scale)
                sums[position][1].add_(weight * grad)
    return [sums[position] for position in positions]


def _largest(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """max|a - b| / max|b| of the worst row; infinite where something is no number."""
    errors = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(found, wanted, strict=True)]
    return float(torch.stack(errors).nan_to_num(torch.inf).max())
