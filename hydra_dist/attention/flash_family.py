"""What FlashAttention's kernels have in common, whichever package brings them.

They take q [B, Sq, Hq, D] and k, v [B, Sk, Hk, D] without repeated key heads, and hand back out [B, Sq, Hq, D] and lse
[B, Hq, Sq] in fp32. Masks are one pair (left, right) of ``Launch.window``, aligned at the last query and the last key.
Packed documents go as rows [T, H, D] with the offsets of the documents among them; lse is then [Hq, T]. head_dim is a
multiple of 8, so others are padded with zeros, which change neither scores nor the gradients that are kept.

The backward adds dq up with atomic operations, in any order, unless it is asked to be deterministic. Torch's own switch
``torch.use_deterministic_algorithms`` asks for that.

Source: Dao 2023 (arXiv 2307.08691); the functions that each module names.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from hydra_dist.attention.launch import Documents, Launch

LARGEST_HEAD_DIM = 256
_ALIGNMENT = 8  # elements of head_dim

Window = tuple[int, int]
Forward = Callable[[Tensor, Tensor, Tensor, float, Window, Documents | None], tuple[Tensor, Tensor]]
"""(q, k, v, scale, window, documents) -> out, lse"""
Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, Window, Documents | None], tuple[Tensor, Tensor, Tensor]
]
"""(grad_out, q, k, v, out, lse, scale, window, documents) -> dq, dk, dv"""


def refuses(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, lowest: int, highest: int
) -> str | None:
    """Why kernels for compute capabilities ``lowest`` to ``highest`` (major numbers) cannot run there, or None."""
    if device.type != "cuda":
        return f"{name} runs on CUDA, and this is {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if not lowest <= major <= highest:
        return f"{name} is for compute capability {lowest}.x to {highest}.x, and this is {major}.{minor}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{name} takes fp16 and bf16, and not {dtype}"
    if head_dim > LARGEST_HEAD_DIM:
        return f"{name} takes head_dim up to {LARGEST_HEAD_DIM}, and this is {head_dim}"
    return None


def forward(kernel: Forward, q: Tensor, k: Tensor, v: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    """out [B, Sq, Hq, D] in q's dtype and lse [B, Hq, Sq] of one launch."""
    documents, head_dim = launch.documents, q.shape[3]
    window = launch.window(q.shape[1], k.shape[1])
    rows = [_prepared(x, documents) for x in (q, k, v)]
    out, lse = kernel(rows[0], rows[1], rows[2], launch.scale, window, documents)
    if documents is not None:
        batch_and_length = q.shape[:2]
        out, lse = out.unflatten(0, batch_and_length), lse.unflatten(1, batch_and_length).transpose(0, 1)
    return out[..., :head_dim], lse


def backward(
    kernel: Backward, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of one launch, in the dtype of q."""
    documents, head_dim = launch.documents, q.shape[3]
    window = launch.window(q.shape[1], k.shape[1])
    rows = [_prepared(x, documents) for x in (grad_out, q, k, v, out.to(q.dtype))]
    if documents is not None:
        lse = lse.transpose(0, 1).flatten(1)
    grads = kernel(rows[0], rows[1], rows[2], rows[3], rows[4], lse.contiguous(), launch.scale, window, documents)
    if documents is not None:
        grads = tuple(grad.unflatten(0, x.shape[:2]) for grad, x in zip(grads, (q, k, v), strict=True))
    grad_q, grad_k, grad_v = (grad[..., :head_dim] for grad in grads)
    return grad_q, grad_k, grad_v


def is_deterministic() -> bool:
    """Whether torch was told to compute nothing in an order that may differ from run to run."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors of the same shapes, for kernels that write into what they are given."""
    return tuple(x.new_empty(x.shape) for x in tensors)


def _prepared(x: Tensor, documents: Documents | None) -> Tensor:
    """Padded to a multiple of 8 with D side by side; the batch's rows one after another where there are documents."""
    if x.shape[-1] % _ALIGNMENT:
        x = functional.pad(x, (0, -x.shape[-1] % _ALIGNMENT))
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x if documents is None else x.flatten(0, 1)
