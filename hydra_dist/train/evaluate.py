"""Held-out loss: bits per byte, and loss by place, which says whether the long context is of use."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hydra_dist.context import ContextParallel
from hydra_dist.data import Sampler
from hydra_dist.train.mesh import Mesh


def evaluate(
    token_nll: Callable[[Tensor, Any, Tensor], Tensor],
    held_out: Sampler,
    context: ContextParallel,
    mesh: Mesh,
    max_rows: int | None = None,
) -> dict[str, Any]:
    """Score the held-out rows in order, each target once.

    Args:
        token_nll: (tokens [B, S_local], sequence plan, targets [B, S_local]) -> nats per target [B, S_local], 0 where
            there is no target; runs without gradient.
        max_rows: the first so many rows; None scores the whole split.

    Returns:
        ``bits_per_byte`` (all targets' bits over the bytes of their text), ``loss`` (nats per target), ``targets``,
        ``text_bytes``, and two lists of bins {start, stop, loss, targets} whose edges double:
        ``loss_by_position`` (place in the packed row) and ``loss_by_context`` (tokens of the same document before it).
    """
    rows = held_out.num_eval_rows if max_rows is None else min(max_rows, held_out.num_eval_rows)
    length = held_out.sequence_length
    edges = bin_edges(length).to(mesh.device)
    # Columns: nats and targets by position, then by context. The last row holds the bytes.
    sums = torch.zeros(len(edges) + 1, 4, dtype=torch.float64, device=mesh.device)
    # Every replica runs equally many rows, so that ZeRO's collectives meet; what is beyond the last row is padding.
    for first in range(0, rows, mesh.data_size):
        row = first + mesh.data_rank
        batch = held_out.eval_batch([row if row < rows else held_out.num_eval_rows])
        plan = context.plan(length, batch.document_starts, device=mesh.device)
        targets = plan.shard(batch.targets.to(mesh.device), dim=1)
        nll = token_nll(plan.shard(batch.tokens.to(mesh.device), dim=1), plan, targets).double()
        scored = targets >= 0
        positions = plan.positions.expand_as(targets)
        assert plan.document_starts is not None
        before = positions - plan.document_starts
        for column, place in ((0, positions), (2, before)):
            index = torch.bucketize(place, edges, right=True) - 1
            sums[:-1, column].index_add_(0, index[scored], nll[scored])
            sums[:-1, column + 1].index_add_(0, index[scored], torch.ones_like(nll[scored]))
        if mesh.rank % mesh.context_size == 0:
            sums[-1, 0] += batch.text_bytes
    dist.all_reduce(sums)
    sums = sums.cpu()
    nats, targets_total, text_bytes = sums[:-1, 0].sum(), sums[:-1, 1].sum(), sums[-1, 0]
    return {
        "bits_per_byte": float(nats / math.log(2) / text_bytes),
        "loss": float(nats / targets_total),
        "targets": int(targets_total),
        "text_bytes": int(text_bytes),
        "rows": rows,
        "sequence_length": length,
        "loss_by_position": _bins(edges, length, sums[:-1, 0], sums[:-1, 1]),
        "loss_by_context": _bins(edges, length, sums[:-1, 2], sums[:-1, 3]),
    }


def bin_edges(length: int) -> Tensor:
    """Left edges 0, 16, 32, 64, ... below ``length``: each bin twice as wide as the one before."""
    edges, edge = [0], 16
    while edge < length:
        edges.append(edge)
        edge *= 2
    return torch.tensor(edges)


def write_evaluation(path: Path, evaluation: dict[str, Any]) -> None:
    """Write ``evaluation.json``, whole or not at all."""
    written = path.with_suffix(".json.new")
    written.write_text(json.dumps(evaluation, indent=2) + "\n", encoding="utf-8")
    os.replace(written, path)


def _bins(edges: Tensor, length: int, nats: Tensor, targets: Tensor) -> list[dict[str, Any]]:
    stops = [*edges[1:].tolist(), length]
    return [
        {"start": start, "stop": stop, "loss": float(n / t) if t else None, "targets": int(t)}
        for start, stop, n, t in zip(edges.tolist(), stops, nats, targets, strict=True)
    ]
