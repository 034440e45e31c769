"""cuDNN's fused attention, through PyTorch's operators.

Called are ``aten._scaled_dot_product_cudnn_attention`` and its backward with the schemas of torch 2.11 to 2.13. Their
softmax statistics are lse as [B, H, Sq, 1]; their causal flag starts at the first query and key, so it is used where
there are as many of one as of the other. They take no window, and packed documents only as nested tensors.

cuDNN builds a plan for each new shape, in much more time than it then computes. Attention of a sequence over itself
meets few shapes; tiles that follow documents and keys that grow token by token meet many, so they are left to others.
Its backward is not deterministic.
"""

import torch
from torch import Tensor
from torch.nn import functional

from hydra_dist.attention import flash_family
from hydra_dist.attention.launch import Form, Launch

_ALIGNMENT = 8  # elements of head_dim


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int, form: Form) -> str | None:
    """Why cuDNN cannot run there or takes no such mask, or None where it can."""
    if form in ("tile", "edge"):
        return "cuDNN would build a plan for each new shape of a tile"
    if form == "rectangle":
        return "cuDNN would build a plan for each new number of keys"
    if form != "square":
        return "cuDNN takes no windows, documents or positions here"
    if flash_family.is_deterministic():
        return "cuDNN's backward is not deterministic, which torch.use_deterministic_algorithms asks for"
    return flash_family.refuses("cuDNN's attention", device, dtype, head_dim, 8, 12)


def forward(q: Tensor, k: Tensor, v: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    """One launch, as ``Backend.forward``."""
    results = torch.ops.aten._scaled_dot_product_cudnn_attention(
        _prepared(q), _prepared(k), _prepared(v), None, True, 0.0, launch.causal, False, scale=launch.scale
    )
    out, lse = results[0], results[1]
    return out[..., : q.shape[3]].transpose(1, 2), lse.reshape(q.shape[0], q.shape[2], q.shape[1])


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch, as ``Backend.backward``."""
    # Without dropout the random state is not read, but it has to be there.
    seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        _prepared(grad_out),
        _prepared(q),
        _prepared(k),
        _prepared(v),
        _prepared(out.to(q.dtype)),
        lse.contiguous().unsqueeze(-1),
        seed,
        offset,
        None,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        launch.causal,
        scale=launch.scale,
    )
    grad_q, grad_k, grad_v = (grad[..., : q.shape[3]].transpose(1, 2) for grad in grads)
    return grad_q, grad_k, grad_v


def _prepared(x: Tensor) -> Tensor:
    """[B, S, H, D] -> [B, H, S, D padded to a multiple of 8], a view of rows that lie in order. Plans are kept by
    shape and strides, so one layout for all means fewer of them."""
    if x.shape[-1] % _ALIGNMENT:
        x = functional.pad(x, (0, -x.shape[-1] % _ALIGNMENT))
    return x.contiguous().transpose(1, 2)
