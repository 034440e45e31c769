"""Combining the attention of the same queries over disjoint sets of keys.

A query's attention over a set of keys is summed up by ``out`` (the weighted mean of their values) and ``lse`` (the log
of its softmax normaliser, the sum of exp(score)). Over the union of two disjoint sets, the normalisers add and each
``out`` counts by its share of the sum. The order of merging does not matter, and the result is exact.

There are two ways to do it. In general a running ``out`` and ``lse`` are kept, and each part rescales them. Where the
scores are bounded, exp(lse) of every part fits into fp32 as it is: then exp(lse) out and exp(lse) are plain sums,
divided once at the end. ``merge_rule`` chooses.

Source: Rabe and Staats 2021 (arXiv 2112.05682), section 2; Liu et al. 2023 (arXiv 2310.01889), equation 4.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

LARGEST_LOGIT_BOUND = 60.0
"""Up to which bound on |score| parts are merged by plain addition.

Over n keys with |score| <= m, lse lies between log(n) - m and log(n) + m. A part weighs 2^-20 exp(lse), which puts 2^40
keys as far above 1 as one key is below: for up to 2^40 keys, weights and their sums lie within exp(+-(m + 13.9)).
Normal fp32 numbers reach from exp(-87.3) to exp(88.7). So m = 60 leaves a factor of 7e5 on both sides for the size of
the values, and exp(60 + 27.7) is still finite. Within that range a sum of floating-point numbers is as exact at one
scale as at another. From m = 74 on, rows with few keys can weigh less than the smallest normal number, and lose digits.
"""
_WEIGHT_SCALE = 2.0**-20
# What even one key weighs, with a little room for the rounding of lse. Less stands for a score below any legal bound.
_SMALLEST_WEIGHT = math.exp(-LARGEST_LOGIT_BOUND - 1.0) * _WEIGHT_SCALE


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
def merge_into(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, all_see_keys: bool = False) -> None:
    """Merge a partial result into a running one, in place.

    Args:
        out, lse: [B, S, H, D] and [B, H, S], fp32 or wider, views allowed; finite, with 0 and -inf for a query that
            has seen no key yet.
        part_out, part_lse: the same shapes over further keys. ``part_out`` may have a narrower dtype; where its lse is
            -inf it is ignored, NaN included.
        all_see_keys: no ``part_lse`` is -inf. Spares a GPU a pass over ``part_out``.
    """
    part_lse = part_lse.to(lse.dtype)
    if not all_see_keys:
        part_out = _without_empty_rows(part_out, part_lse)
    # out + weight * (part - out) with weight = exp(part_lse - merged lse): one pass over the largest tensors.
    weight = torch.sigmoid(part_lse - lse)
    if not all_see_keys:
        # Where both are -inf the difference is NaN, and there is nothing to add.
        weight.masked_fill_(part_lse == -torch.inf, 0.0)
    out.lerp_(part_out.to(out.dtype), _per_row(weight).to(out.dtype))
    torch.logaddexp(lse, part_lse, out=lse)


class MergeRule(Protocol):
    """How parts add up to a running result, two tensors in fp32 or wider that only the rule can read.

    ``start`` makes them for queries [B, S, H, D], ``put`` writes the first part of some rows over what stands there,
    ``add`` adds any part (its arguments are those of ``merge_into``), and ``finish`` gives out in ``dtype`` and lse.
    """

    nothing: float
    """In the second tensor, for a query that has seen no key yet."""

    def start(self, q: Tensor) -> tuple[Tensor, Tensor]: ...

    def put(self, out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None: ...

    def add(self, out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, all_see_keys: bool = False) -> None: ...

    def finish(self, out: Tensor, lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]: ...


class LogSumExp:
    """For any scores: the running result is the merged ``out`` and ``lse`` of the keys so far."""

    nothing = -math.inf

    def start(self, q: Tensor) -> tuple[Tensor, Tensor]:
        return _start(q, self.nothing)

    def put(self, out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
        out.copy_(part_out)
        lse.copy_(part_lse)

    def add(self, out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, all_see_keys: bool = False) -> None:
        merge_into(out, lse, part_out, part_lse, all_see_keys)

    def finish(self, out: Tensor, lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return out.to(dtype), lse


class PlainAddition:
    """For scores within ``LARGEST_LOGIT_BOUND``: the running result is the sums of weight x out and of the weights.

    A part whose lse says otherwise is not added up wrongly: its rows come out NaN or infinite.
    """

    nothing = 0.0

    def start(self, q: Tensor) -> tuple[Tensor, Tensor]:
        return _start(q, self.nothing)

    @torch.no_grad()
    def put(self, out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
        weight = _weight(part_lse.to(lse.dtype), True)
        torch.mul(part_out, _per_row(weight).to(out.dtype), out=out)
        lse.copy_(weight)

    @torch.no_grad()
    def add(self, out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, all_see_keys: bool = False) -> None:
        part_lse = part_lse.to(lse.dtype)
        if not all_see_keys:
            part_out = _without_empty_rows(part_out, part_lse)
        weight = _weight(part_lse, all_see_keys)
        out.addcmul_(part_out, _per_row(weight).to(out.dtype))
        lse.add_(weight)

    @torch.no_grad()
    def finish(self, out: Tensor, lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Overwrites what it is given."""
        total = _per_row(lse.masked_fill(lse == 0.0, 1.0)).to(out.dtype)
        return out.div_(total).to(dtype), lse.mul_(1.0 / _WEIGHT_SCALE).log_()


def merge_rule(logit_bound: float | None) -> MergeRule:
    """The way of merging that is right for scores within +-``logit_bound``; None: nothing is known of them.

    Raises:
        ValueError: the bound is negative or NaN.
    """
    if logit_bound is None:
        return LogSumExp()
    if not logit_bound >= 0.0:
        raise ValueError(f"logit_bound {logit_bound}: a bound on |score| is 0 or more, or None where there is none")
    return PlainAddition() if logit_bound <= LARGEST_LOGIT_BOUND else LogSumExp()


def _start(q: Tensor, nothing: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_zeros(q.shape, dtype=wide), q.new_full((q.shape[0], q.shape[2], q.shape[1]), nothing, dtype=wide)


def _weight(part_lse: Tensor, all_see_keys: bool) -> Tensor:
    """2^-20 exp(part_lse), NaN where this is too small to be right; exp comes first, so that the scale is exact."""
    weight = torch.threshold_(part_lse.exp().mul_(_WEIGHT_SCALE), _SMALLEST_WEIGHT, math.nan)
    return weight if all_see_keys else weight.masked_fill_(part_lse == -torch.inf, 0.0)


def _without_empty_rows(part_out: Tensor, part_lse: Tensor) -> Tensor:
    """``part_out`` with zeros for queries without keys, whatever stood there."""
    empty = part_lse == -torch.inf
    # On the CPU one look at lse spares a pass over part_out; on a GPU looking would wait for the device.
    if part_out.is_cuda or bool(empty.any()):
        return part_out.masked_fill(_per_row(empty), 0.0)
    return part_out


def _per_row(values: Tensor) -> Tensor:
    """[B, H, S] -> [B, S, H, 1]"""
    return values.transpose(1, 2).unsqueeze(-1)
