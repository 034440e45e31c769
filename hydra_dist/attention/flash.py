"""PyTorch's fused attention operators, on the CPU one tile at a time, and on CUDA.

A fused ("flash") operator never keeps the score matrix: it walks over blocks of keys with a running softmax and hands
back ``out`` and ``lse``, from which the backward recomputes the scores block by block.

On the CPU half precision is computed in fp32 where that costs nothing or is needed: the forward is as fast in fp32 as
in bf16, and its partial results then lose nothing before they are merged. fp16's backward is ten times slower than
fp32's. bf16's backward is the slower one for small tiles and the faster one for large tiles, where it stays; but the
operator adds up dk and dv in bf16 over shared heads and over blocks of queries, so each query head gets its own keys
and long tiles are cut; the sums outside are fp32.

Source: Dao et al. 2022 (arXiv 2205.14135); the schemas of torch.ops.aten._scaled_dot_product_*.
"""

from functools import lru_cache

import torch
from torch import Tensor

from hydra_dist.attention import flash_cuda
from hydra_dist.attention.band import Band
from hydra_dist.attention.launch import Form, Launch
from hydra_dist.attention.reference import repeat_groups, sum_groups

_HALF = (torch.float16, torch.bfloat16)
# Queries of one bf16 backward call. The operator rounds dk and dv to bf16 after each block of 256 queries (64 below
# 768): measured against fp64, 3.4e-3 with calls of 1,024 queries at any length, 4.7e-3 uncut at 2,048, 8.7e-3 at 8,192.
_LONGEST_BF16_BACKWARD = 1024
# Scores of the largest tile whose bf16 backward is computed in fp32. Measured with 8 query and 2 key heads of 64 on one
# core: 128 x 128 takes 0.9 ms instead of 2.0, 256 x 512 6.8 instead of 6.4, 1,024 x 1,024 causal 41 instead of 25.
_LARGEST_FP32_BACKWARD = 512 * 512


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int, form: Form) -> str | None:
    """Why this backend cannot run there or takes no such mask in one launch, or None where it can."""
    if device.type == "cpu":
        if dtype not in (torch.float64, torch.float32, *_HALF):
            return f"PyTorch's flash operator takes no {dtype} on the CPU"
        return None if form in ("tile", "edge") else "on the CPU it goes tile by tile"
    if device.type == "cuda":
        return flash_cuda.refuses(device, dtype, head_dim, form)
    return f"PyTorch has no flash operator that returns lse for the device {device.type}"


def forward_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What the forward of inputs of ``dtype`` is computed in, and what its partial results come in."""
    return torch.float32 if device.type == "cpu" and dtype in _HALF else dtype


def backward_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What the backward of inputs of ``dtype`` is computed in."""
    return torch.float32 if device.type == "cpu" and dtype == torch.float16 else dtype


def forward(q: Tensor, k: Tensor, v: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    """One launch, as ``Backend.forward``; every query sees a key."""
    if q.is_cuda:
        return flash_cuda.forward(q, k, v, launch)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _heads_first(q),
        _heads_first(k),
        _heads_first(v),
        0.0,
        launch.causal,
        attn_mask=_additive(launch.band, q.dtype),
        scale=launch.scale,
    )
    return out.transpose(1, 2), lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch, as ``Backend.backward``."""
    if q.is_cuda:
        return flash_cuda.backward(grad_out, q, k, v, out, lse, launch)
    if q.dtype in _HALF and q.shape[1] * k.shape[1] <= _LARGEST_FP32_BACKWARD:
        return _backward_cpu(grad_out.float(), q.float(), k.float(), v.float(), out, lse, launch)
    if q.dtype in _HALF:
        return _backward_half(grad_out, q, k, v, out, lse, launch)
    return _backward_cpu(grad_out, q, k, v, out, lse, launch)


def _backward_cpu(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _heads_first(grad_out),
        _heads_first(q),
        _heads_first(k),
        _heads_first(v),
        _heads_first(out.to(q.dtype)),
        lse,
        0.0,
        launch.causal,
        attn_mask=_additive(launch.band, q.dtype),
        scale=launch.scale,
    )
    grad_q, grad_k, grad_v = (grad.transpose(1, 2) for grad in grads)
    return grad_q, grad_k, grad_v


def _backward_half(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 with sums in fp32: keys repeated for every query head, and at most so many queries in a call."""
    num_key_heads, length = k.shape[2], q.shape[1]
    k, v = repeat_groups(k, q.shape[2]), repeat_groups(v, q.shape[2])
    if length <= _LONGEST_BF16_BACKWARD or launch.band is not None:
        grad_q, grad_k, grad_v = _backward_cpu(grad_out, q, k, v, out, lse, launch)
        return grad_q, sum_groups(grad_k.float(), num_key_heads), sum_groups(grad_v.float(), num_key_heads)
    sums = tuple(x.new_zeros(x.shape, dtype=torch.float32) for x in (q, k, v))
    everything, diagonal = Launch(launch.scale), Launch(launch.scale, causal=True)
    for start in range(0, length, _LONGEST_BF16_BACKWARD):
        rows = slice(start, min(start + _LONGEST_BF16_BACKWARD, length))
        pieces = [(slice(0, start), everything), (rows, diagonal)] if launch.causal else [(slice(None), everything)]
        for keys, piece in pieces:
            if keys.stop == 0:
                continue
            ends = out[:, rows], lse[..., rows]
            parts = _backward_cpu(grad_out[:, rows], q[:, rows], k[:, keys], v[:, keys], *ends, piece)
            for total, at, part in zip(sums, (rows, keys, keys), parts, strict=True):
                total[:, at].add_(part)
    grad_q, grad_k, grad_v = sums
    return grad_q, sum_groups(grad_k, num_key_heads), sum_groups(grad_v, num_key_heads)


def _heads_first(x: Tensor) -> Tensor:
    """[B, S, H, D] -> [B, H, S, D], a view; the operators read each head's D numbers side by side."""
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


@lru_cache(maxsize=16)
def _additive_of(band: Band, dtype: torch.dtype) -> Tensor:
    allowed = band.allowed("cpu")
    return torch.zeros(1, 1, *allowed.shape, dtype=dtype, device="cpu").masked_fill_(~allowed, -torch.inf)


def _additive(band: Band | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as numbers added to the scores, [1, 1, R, C]; neighbouring tiles of a window share it."""
    return None if band is None else _additive_of(band, dtype)
