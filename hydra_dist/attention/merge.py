"""Combining the attention of the same queries over disjoint sets of keys.

A query's attention over a set of keys is summed up by ``out`` (the weighted mean of their values) and ``lse`` (the log
of its softmax normaliser, the sum of exp(score)). Over the union of two disjoint sets, the normalisers add and each
``out`` counts by its share of the sum. The order of merging does not matter, and the result is exact.

Source: Rabe and Staats 2021 (arXiv 2112.05682), section 2; Liu et al. 2023 (arXiv 2310.01889), equation 4.
"""

import torch
from torch import Tensor


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partial results into new tensors.

    Args:
        out_a, out_b: [B, S, H, D], any floating dtype. The ``out`` of a query without keys is ignored, NaN included.
        lse_a, lse_b: [B, H, S], fp32 or wider; -inf for a query without keys.

    Returns:
        out [B, S, H, D] in the widest of fp32 and the inputs' dtypes, lse [B, H, S] in the wider of its inputs'. A
        query without keys on either side comes back as 0 and -inf.

    Not for autograd: the backward of attention needs only the merged ``out`` and ``lse``.
    """
    dtype = torch.promote_types(torch.promote_types(out_a.dtype, out_b.dtype), torch.float32)
    lse = lse_a.to(torch.promote_types(lse_a.dtype, lse_b.dtype), copy=True)
    out = out_a.to(dtype, copy=True).masked_fill_(_per_row(lse == -torch.inf), 0.0)
    merge_into(out, lse, out_b, lse_b)
    return out, lse


@torch.no_grad()
def merge_into(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge a partial result into a running one, in place.

    Args:
        out, lse: [B, S, H, D] and [B, H, S], fp32 or wider, views allowed; finite, with 0 and -inf for a query that
            has seen no key yet.
        part_out, part_lse: the same shapes over further keys. ``part_out`` may have a narrower dtype; where its lse is
            -inf it is ignored, NaN included.
    """
    part_lse = part_lse.to(lse.dtype)
    empty = part_lse == -torch.inf
    # On the CPU one look at lse spares a pass over part_out; on a GPU looking would wait for the device.
    if part_out.is_cuda or bool(empty.any()):
        part_out = part_out.masked_fill(_per_row(empty), 0.0)
    # out + weight * (part - out) with weight = exp(part_lse - merged lse): one pass over the largest tensors.
    # Where both are -inf the difference is NaN, and there is nothing to add.
    weight = torch.sigmoid(part_lse - lse).masked_fill_(empty, 0.0)
    out.lerp_(part_out.to(out.dtype), _per_row(weight).to(out.dtype))
    torch.logaddexp(lse, part_lse, out=lse)


def _per_row(values: Tensor) -> Tensor:
    """[B, H, S] -> [B, S, H, 1]"""
    return values.transpose(1, 2).unsqueeze(-1)
