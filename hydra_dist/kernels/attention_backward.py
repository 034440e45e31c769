"""The gradients of softmax attention over any mask, from the saved ``out`` and ``lse``, in a fixed order of additions.

    P = exp(scale Q K^T - lse),  dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = scale dS K,  dK = scale dS^T Q

with delta = rowsum(dO * O). One kernel computes dK and dV of a block of keys, another dQ of a block of queries. Neither
adds to memory that another program writes, so equal inputs give equal bits.

``out`` and ``lse`` may stand for more keys than are given; the gradients are then the part that comes from these keys.

Source: Dao 2023 (arXiv 2307.08691), algorithm 2.
"""
# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydra_dist.kernels import attention_backward_keys, attention_backward_queries
from hydra_dist.kernels.attention_launch import (
    SUMMARY_MULTIPLE,
    MaskArguments,
    Tile,
    check_inputs,
    strides,
    unit_stride,
)
from hydra_dist.kernels.specialization import Specialization, of_launch

SUMMARY_ROWS = 32
"""Rows of one program of the kernel that computes delta, on every chip: it only reads and adds."""


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    document_starts: Tensor | None = None,
    k_document_starts: Tensor | None = None,
    grad_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
    visits: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v that come from these keys.

    Args:
        grad_out: [B, Sq, Hq, D], the gradient of the final ``out``, in the dtype of q.
        q, k, v, scale, causal, window, q_positions, k_positions, document_starts, k_document_starts: as in
            ``hydra_dist.kernels.attention_forward.forward``.
        out: [B, Sq, Hq, D], the final one over all keys, in the dtype of q or wider.
        lse: [B, Hq, Sq] in fp32, the final one; -inf for queries that see no key, which neither give nor take part.
        grad_dtype: of the result; None: fp32, unrounded sums.
        tile: other blocks than the tables', for both kernels.
        visits: int32 [B, Hk, key blocks] and [B, Hq, query blocks], receive how many blocks each program visited; a
            program of keys counts those of all its query heads.

    Returns:
        grad_q [B, Sq, Hq, D], grad_k and grad_v [B, Sk, Hk, D].

    Raises:
        ValueError: inputs or a device that the kernels cannot take.
    """
    check_inputs(q, k, v)
    _check_saved(q, grad_out, out, lse)
    dtype = grad_dtype or torch.float32
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=dtype, device=q.device) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_()
    mask = MaskArguments(causal, window, q_positions, k_positions, document_starts, k_document_starts)
    key_visits, query_visits = (None, None) if visits is None else visits
    q, k, v, grad_out, lse = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(grad_out), lse.contiguous()
    saved = (grad_out, q, k, v, summarize(grad_out, unit_stride(out), lse))
    attention_backward_keys.launch(saved, (grad_k, grad_v), scale, mask, key_visits, tile)
    attention_backward_queries.launch(saved, grad_q, scale, mask, query_visits, tile)
    return grad_q, grad_k, grad_v


def summarize(grad_out: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """What the gradients need of each query and head besides its rows, in fp32.

    Args:
        grad_out, out: [B, Sq, Hq, D].
        lse: [B, Hq, Sq].

    Returns:
        [2, B, Hq, Sq and more]: lse / log(2), with inf for queries that see no key, which makes their probabilities
        zero; and delta. The length is a multiple of every block size; rows past the end have inf and 0.
    """
    batch_size, length, heads, _ = out.shape
    padded = SUMMARY_MULTIPLE * triton.cdiv(length, SUMMARY_MULTIPLE)
    summary = torch.empty(2, batch_size, heads, padded, dtype=torch.float32, device=out.device)
    grid = (padded // SUMMARY_ROWS, batch_size * heads)
    _summary_kernel[grid](**_summary_arguments(grad_out, out, lse, summary), num_warps=4)
    return summary


def specializations() -> list[Specialization]:
    """Of bf16 gradients and unrounded output, as a ring has them."""
    grad_out = torch.empty(2, 4096, 8, 128, dtype=torch.bfloat16, device="meta")
    summary = torch.empty(2, 2, 8, 4096, device="meta")
    arguments = _summary_arguments(grad_out, grad_out.float(), summary[0], summary)
    return [
        of_launch("summary bfloat16 d128", _summary_kernel, arguments, num_warps=4, num_stages=1, tensor_cores=False)
    ]


def _check_saved(q: Tensor, grad_out: Tensor, out: Tensor, lse: Tensor) -> None:
    if grad_out.shape != q.shape or grad_out.dtype != q.dtype:
        raise ValueError(
            f"grad_out is {grad_out.dtype} {list(grad_out.shape)} and q is {q.dtype} {list(q.shape)}; they must be "
            "the same"
        )
    if out.shape != q.shape:
        raise ValueError(f"out has shape {list(out.shape)} and q {list(q.shape)}; they must be the same")
    expected = (q.shape[0], q.shape[2], q.shape[1])
    if lse.shape != expected or lse.dtype != torch.float32:
        raise ValueError(f"lse is {lse.dtype} {list(lse.shape)}; fp32 of shape {list(expected)} is needed")


def _summary_arguments(grad_out: Tensor, out: Tensor, lse: Tensor, summary: Tensor) -> dict[str, Any]:
    return {
        "grad_out": grad_out,
        "out": out,
        "lse": lse,
        "summary": summary,
        "num_heads": out.shape[2],
        "length": out.shape[1],
        "padded": summary.shape[3],
        **strides(grad_out=grad_out, out=out),
        "HEAD_DIM": out.shape[3],
        "BLOCK_D": triton.next_power_of_2(out.shape[3]),
        "BLOCK": SUMMARY_ROWS,
    }


@triton.jit
def _summary_kernel(
    grad_out,
    out,
    lse,
    summary,
    num_heads,
    length,
    padded,
    grad_out_batch,
    grad_out_row,
    grad_out_head,
    out_batch,
    out_row,
    out_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < length)[:, None] & (column < HEAD_DIM)
    grad_out += batch * grad_out_batch + head * grad_out_head + row[:, None] * grad_out_row + column
    out += batch * out_batch + head * out_head + row[:, None] * out_row + column
    product = tl.load(grad_out, mask=inside, other=0.0).to(tl.float32)
    product *= tl.load(out, mask=inside, other=0.0).to(tl.float32)
    own = tl.load(lse + tl.program_id(1).to(tl.int64) * length + row, mask=row < length, other=float("-inf"))
    own = tl.where(own == float("-inf"), float("inf"), own * 1.4426950408889634)
    summary += tl.program_id(1).to(tl.int64) * padded + row
    tl.store(summary, own)
    tl.store(summary + tl.num_programs(1).to(tl.int64) * padded, tl.sum(product, 1))
