"""PyTorch's fused attention operators on CUDA, one tile at a time.

FlashAttention-2 takes fp16 and bf16 without a mask or with the causal flag. The memory-efficient operator takes fp32,
explicit masks, and fp16 on chips from before Ampere. Both hand back partial results in the inputs' dtype.

They are called with what the public scaled_dot_product_attention prepares on its way to them: head_dim padded with
zeros to a multiple of 8, one key head for each query head, an additive mask whose rows start at aligned addresses, and
for the memory-efficient backward an lse padded to a multiple of 32 queries with +inf, which stands for a probability
of zero.

Source: the schemas of torch.ops.aten._scaled_dot_product_{flash,efficient}_attention and their CUDA kernels.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hydra_dist.attention.band import Band
from hydra_dist.attention.reference import repeat_groups, sum_groups

_HALF = (torch.float16, torch.bfloat16)
_LARGEST_FLASH_HEAD_DIM = 256
_LSE_ALIGNMENT = 32  # queries, in the memory-efficient operator
_BIAS_ALIGNMENT = 16  # keys between the starts of a mask's rows


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why these operators cannot run there, or None where they can."""
    if dtype not in (torch.float32, *_HALF):
        return f"PyTorch's flash operators take no {dtype} on CUDA"
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        return "bf16 attention needs compute capability 8.0 or higher"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, band: Band | None, scale: float) -> tuple[Tensor, Tensor]:
    """One tile, as ``flash.forward``."""
    length, head_dim = q.shape[1], q.shape[3]
    num_query_heads = q.shape[2]
    q, k, v = _prepared(q), _prepared(k, num_query_heads), _prepared(v, num_query_heads)
    if _takes_flash(q, band):
        results = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        out, lse = results[0], results[1]
    else:
        out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, _bias(band, q), True, 0.0, causal, scale=scale
        )
    return out[..., :head_dim].transpose(1, 2), lse[..., :length]


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    band: Band | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One tile, as ``flash.backward``; dk and dv are summed over the heads that share them in fp32."""
    head_dim, num_query_heads, num_key_heads = q.shape[3], q.shape[2], k.shape[2]
    q, grad_out, out = _prepared(q), _prepared(grad_out), _prepared(out.to(q.dtype))
    k, v = _prepared(k, num_query_heads), _prepared(v, num_query_heads)
    grads = _flash_backward if _takes_flash(q, band) else _efficient_backward
    grad_q, grad_k, grad_v = (
        grad[..., :head_dim].transpose(1, 2) for grad in grads(grad_out, q, k, v, out, lse, causal, band, scale)
    )
    if num_key_heads != num_query_heads:
        grad_k, grad_v = sum_groups(grad_k.float(), num_key_heads), sum_groups(grad_v.float(), num_key_heads)
    return grad_q, grad_k, grad_v


def _flash_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    band: Band | None,
    scale: float,
) -> Any:
    assert band is None
    # Without dropout the random state is not read, but it has to be there.
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    offset = torch.zeros((), dtype=torch.uint64, device=q.device)
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad_out,
        q,
        k,
        v,
        out,
        lse.contiguous(),
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        seed,
        offset,
        scale=scale,
    )


def _efficient_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    band: Band | None,
    scale: float,
) -> Any:
    padded = functional.pad(lse, (0, -lse.shape[-1] % _LSE_ALIGNMENT), value=torch.inf).contiguous()
    nothing = torch.zeros((), dtype=torch.int64, device=q.device)
    grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad_out,
        q,
        k,
        v,
        _bias(band, q),
        out,
        padded,
        nothing,
        nothing,
        0.0,
        [True, True, True, False],
        causal,
        scale=scale,
    )
    return grads[:3]


def _takes_flash(q: Tensor, band: Band | None) -> bool:
    """Whether FlashAttention-2 runs this tile (q [B, H, S, D], prepared); the memory-efficient operator otherwise."""
    return (
        band is None
        and q.dtype in _HALF
        and q.shape[-1] <= _LARGEST_FLASH_HEAD_DIM
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _prepared(x: Tensor, num_query_heads: int | None = None) -> Tensor:
    """[B, S, H, D] -> [B, Hq, S, D padded to a multiple of 8], with D contiguous."""
    if num_query_heads is not None:
        x = repeat_groups(x, num_query_heads)
    if x.shape[-1] % 8:
        x = functional.pad(x, (0, -x.shape[-1] % 8))
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


@lru_cache(maxsize=16)
def _bias_of(band: Band, dtype: torch.dtype, device: torch.device) -> Tensor:
    width = band.num_keys + -band.num_keys % _BIAS_ALIGNMENT
    bias = torch.zeros(1, 1, band.num_queries, width, dtype=dtype, device=device)
    return bias[..., : band.num_keys].masked_fill_(~band.allowed(device), -torch.inf)


def _bias(band: Band | None, q: Tensor) -> Tensor | None:
    """The mask as numbers added to the scores: one aligned [R, C] seen as [B, H, R, C]."""
    if band is None:
        return None
    return _bias_of(band, q.dtype, q.device).expand(q.shape[0], q.shape[1], -1, -1)
