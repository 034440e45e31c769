"""PyTorch's fused attention operators on CUDA.

FlashAttention-2 takes fp16 and bf16: tiles without a mask or with the causal flag, and, through
``aten._flash_attention_forward`` and its backward, whole windows and packed documents. The memory-efficient operator
takes fp32, explicit masks, and fp16 on chips from before Ampere. Both hand back partial results in the inputs' dtype.

Tiles are called with what the public scaled_dot_product_attention prepares on its way to them: head_dim padded with
zeros to a multiple of 8, one key head for each query head (dk and dv are then added up over them in fp32), an additive
mask whose rows start at aligned addresses, and for the memory-efficient backward an lse padded to a multiple of 32
queries with +inf, which stands for a probability of zero.

Source: the schemas of torch.ops.aten._scaled_dot_product_{flash,efficient}_attention and _flash_attention_forward, the
same from torch 2.11 to 2.13 in the arguments used here, and their CUDA kernels.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hydra_dist.attention import flash_family
from hydra_dist.attention.band import Band
from hydra_dist.attention.flash_family import Window
from hydra_dist.attention.launch import Documents, Form, Launch
from hydra_dist.attention.reference import repeat_groups, sum_groups
from hydra_dist.costs.tiles import LARGEST_BLOCK, WIDEST_MASK

_HALF = (torch.float16, torch.bfloat16)
_LSE_ALIGNMENT = 32  # queries, in the memory-efficient operator
_BIAS_ALIGNMENT = 16  # keys between the starts of a mask's rows


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int, form: Form) -> str | None:
    """Why these operators cannot run there or take no such mask in one launch, or None where they can."""
    if dtype not in (torch.float32, *_HALF):
        return f"PyTorch's flash operators take no {dtype} on CUDA"
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        return "bf16 attention needs compute capability 8.0 or higher"
    if form == "any":
        return "PyTorch's flash operators take no positions and no documents of other rows"
    if form in ("window", "documents"):
        return flash_family.refuses("PyTorch's flash operator for whole masks", device, dtype, head_dim, 8, 12)
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    """One launch, as ``Backend.forward``."""
    if _is_whole(launch):
        return flash_family.forward(_rows_forward, q, k, v, launch)
    length, head_dim = q.shape[1], q.shape[3]
    num_query_heads = q.shape[2]
    q, k, v = _prepared(q), _prepared(k, num_query_heads), _prepared(v, num_query_heads)
    if _takes_flash(q, launch):
        results = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, launch.causal, False, scale=launch.scale
        )
        out, lse = results[0], results[1]
    else:
        out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, _bias(launch.band, q), True, 0.0, launch.causal, scale=launch.scale
        )
    return out[..., :head_dim].transpose(1, 2), lse[..., :length]


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch, as ``Backend.backward``; a tile's dk and dv are summed over the heads that share them in fp32."""
    if _is_whole(launch):
        return flash_family.backward(_rows_backward, grad_out, q, k, v, out, lse, launch)
    head_dim, num_query_heads, num_key_heads = q.shape[3], q.shape[2], k.shape[2]
    q, grad_out, out = _prepared(q), _prepared(grad_out), _prepared(out.to(q.dtype))
    k, v = _prepared(k, num_query_heads), _prepared(v, num_query_heads)
    grads = _flash_backward if _takes_flash(q, launch) else _efficient_backward
    grad_q, grad_k, grad_v = (
        grad[..., :head_dim].transpose(1, 2) for grad in grads(grad_out, q, k, v, out, lse, launch)
    )
    if num_key_heads != num_query_heads:
        grad_k, grad_v = sum_groups(grad_k.float(), num_key_heads), sum_groups(grad_v.float(), num_key_heads)
    return grad_q, grad_k, grad_v


def _flash_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, launch: Launch) -> Any:
    lengths = q.shape[2], k.shape[2]
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *(grad_out, q, k, v, out, lse.contiguous(), None, None, *lengths, 0.0, launch.causal, *_random_state(q)),
        scale=launch.scale,
    )


def _efficient_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, launch: Launch
) -> Any:
    padded = functional.pad(lse, (0, -lse.shape[-1] % _LSE_ALIGNMENT), value=torch.inf).contiguous()
    nothing = torch.zeros((), dtype=torch.int64, device=q.device)
    wanted = [True, True, True, False]
    bias = _bias(launch.band, q)
    grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        *(grad_out, q, k, v, bias, out, padded, nothing, nothing, 0.0, wanted, launch.causal), scale=launch.scale
    )
    return grads[:3]


def _rows_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: Window, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    results = torch.ops.aten._flash_attention_forward(
        *(q, k, v, *_offsets(q, k, documents), 0.0, window[1] == 0, False),
        scale=scale,
        window_size_left=window[0],
        window_size_right=window[1],
    )
    return results[0], results[1]


def _rows_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: Window,
    documents: Documents | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        *(grad_out, q, k, v, out, lse, *_offsets(q, k, documents), 0.0, window[1] == 0, *_random_state(q)),
        scale=scale,
        window_size_left=window[0],
        window_size_right=window[1],
    )
    return dq, dk, dv


def _offsets(q: Tensor, k: Tensor, documents: Documents | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    """The operator's cum_seq_q, cum_seq_k, max_q, max_k."""
    if documents is None:
        return None, None, q.shape[1], k.shape[1]
    return documents.offsets, documents.offsets, documents.longest, documents.longest


def _random_state(q: Tensor) -> tuple[Tensor, Tensor]:
    """Without dropout it is not read, but it has to be there."""
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return seed, torch.zeros((), dtype=torch.uint64, device=q.device)


def _is_whole(launch: Launch) -> bool:
    """Documents, and windows larger than the tiles along their edge: no explicit mask is ever made for these."""
    band = launch.band
    return launch.documents is not None or (
        band is not None and (band.num_queries > LARGEST_BLOCK or band.num_keys > WIDEST_MASK)
    )


def _takes_flash(q: Tensor, launch: Launch) -> bool:
    """Whether FlashAttention-2 runs this tile (q [B, H, S, D], prepared); the memory-efficient operator otherwise."""
    return (
        launch.band is None
        and q.dtype in _HALF
        and q.shape[-1] <= flash_family.LARGEST_HEAD_DIM
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
