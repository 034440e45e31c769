"""The backward of the CCGQA prologue in three Triton kernels.

Range by range of the rows, the first takes the gradients of queries and keys back through rotation and norm, the second
back through the convolutions. The third sums up what their programs leave for the weights, always in the same order:
two runs give the same bits. The reference, with the formulas, is ``hydra_dist/model/prologue_plain.py``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hydra_dist.kernels import ccgqa_prologue_convolutions, ccgqa_prologue_norm, ccgqa_prologue_weights
from hydra_dist.kernels.ccgqa_prologue_rows import Shape, check, on_device
from hydra_dist.kernels.ccgqa_prologue_workspace import Tiling, Workspace

Gradients = tuple[
    Tensor,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
]


def backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    q: Tensor,
    k: Tensor,
    inv: Tensor,
    p: Tensor,
    z_before: Tensor | None,
    v_before: Tensor | None,
    ages: Tensor | None,
    chunk_lengths: Sequence[int],
    w0: Tensor | None,
    b0: Tensor | None,
    w1: Tensor | None,
    beta: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    num_query_heads: int,
    num_key_heads: int,
    head_dim: int,
    kernel_sizes: tuple[int, int],
    use_qk_mean: bool,
    eps: float | None,
    value_shift: bool,
    tiling: Tiling | None = None,
) -> Gradients:
    """Gradients of ``forward``.

    Args:
        grad_q, grad_k, grad_v: [B, S, heads, D] in any strides.
        q, k, inv: what ``forward`` returned.
        beta: no element may be zero: keys of length zero say nothing about their direction.
        tiling: None takes that of ``TILINGS``.
        Everything else as ``forward`` got it.

    Returns:
        grad_p [B, S, C + V], grad_z_before and grad_v_before in p's dtype; grad_w0, grad_b0, grad_w1, grad_b1 and
        grad_beta in fp32. None for what was None.

    Raises:
        ValueError: a shape or device that the kernels do not take (``refuses``).
    """
    shape = Shape(num_query_heads, num_key_heads, head_dim, kernel_sizes, use_qk_mean, eps, value_shift)
    check(p, shape, tuple(chunk_lengths), cos)
    workspace = Workspace(p, z_before, v_before, ages, w0, w1, beta, tuple(chunk_lengths), shape, tiling)
    grad_taps: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] = (None, None, None, None)
    with on_device(p.device):
        tensors = ccgqa_prologue_norm.inputs(shape, (grad_q, grad_k, grad_v), q, k, inv, cos, sin)
        for rows in workspace.ranges:
            ccgqa_prologue_norm.launch(workspace, tensors, rows)
            if workspace.needs_second:
                ccgqa_prologue_convolutions.launch(workspace, rows)
        if workspace.x_parts is not None and not workspace.ranges:
            workspace.x_parts.zero_()
        if b0 is not None:
            grad_taps = ccgqa_prologue_weights.launch(workspace, b0)
    grad_beta = None
    if beta is not None:
        empty = torch.zeros_like(beta, dtype=torch.float32)
        grad_beta = empty if workspace.beta_parts is None else workspace.beta_parts.sum(0)
    return workspace.grad_p, workspace.grad_z_before, workspace.grad_v_before, *grad_taps, grad_beta
