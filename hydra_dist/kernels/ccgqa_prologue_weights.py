"""Kernel: the gradients of both convolutions' weights, from the sums that the programs of the backward left.

With X_e = sum_t z_{t-e} (x) dy_t (``ccgqa_prologue_convolutions``), i and d the delays of the two convolutions' taps:

    dW1_d = b0 (x) db1 + sum_i diag(w0_i) X_{d+i}      dw0_i = sum_d rowsum(W1_d * X_{d+i})      db0 = sum_d W1_d db1
"""

# mypy: allow-untyped-defs, disable-error-code="assignment,misc,var-annotated"

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hydra_dist.kernels.ccgqa_prologue_examples import EXAMPLES, Example
from hydra_dist.kernels.ccgqa_prologue_rows import padded, transposed_tap
from hydra_dist.kernels.ccgqa_prologue_workspace import Workspace, example_workspace
from hydra_dist.kernels.specialization import Specialization, of_launch

CHANNELS = 16
"""Input channels of a head in one program."""
NUM_WARPS = 8


def launch(workspace: Workspace, b0: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of w0, b0, w1 and b1 in fp32, shaped as these are."""
    arguments = _arguments(workspace, b0)
    grid = (workspace.shape.num_heads, triton.cdiv(workspace.shape.head_dim, CHANNELS))
    weight_gradients[grid](**arguments, num_warps=NUM_WARPS, num_stages=1)
    return tuple(arguments[f"grad_{name}"] for name in ("w0", "b0", "w1", "b1"))


def specializations() -> list[Specialization]:
    """The variants for ``EXAMPLES``."""
    return [_specialization(example, chip) for example in EXAMPLES for chip in example.chips]


def _specialization(example: Example, chip: str) -> Specialization:
    workspace, _ = example_workspace(example, chip)
    arguments = _arguments(workspace, workspace.empty(example.shape.latent_size))
    return of_launch(
        f"prologue, weights backward: {example}",
        weight_gradients,
        arguments,
        num_warps=NUM_WARPS,
        num_stages=1,
        tensor_cores=False,
        chips=(chip,),
        routine=example.routine,
    )


def _arguments(workspace: Workspace, b0: Tensor) -> dict[str, Any]:
    """The kernel's arguments by name; what it writes is made here."""
    w0, w1, b1_parts, x_parts = workspace.w0, workspace.w1, workspace.b1_parts, workspace.x_parts
    assert w0 is not None
    assert w1 is not None
    assert b1_parts is not None
    assert x_parts is not None
    return {
        "x_parts": x_parts,
        "grad_b1": b1_parts.sum(0),
        "w0": w0,
        "b0": b0.contiguous(),
        "w1": w1,
        "grad_w0": workspace.empty(*w0.shape),
        "grad_b0": workspace.empty(*b0.shape),
        "grad_w1": workspace.empty(*w1.shape),
        **workspace.heads_and_taps(),
        "CHANNELS": CHANNELS,
        "LANES": padded(workspace.shape.head_dim),
    }


@triton.jit
def weight_gradients(
    x_parts,
    grad_b1,
    w0,
    b0,
    w1,
    grad_w0,
    grad_b0,
    grad_w1,
    query_splits,
    key_splits,
    NUM_QUERY_HEADS: tl.constexpr,
    NUM_KEY_HEADS: tl.constexpr,
    D: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sum X over programs, in their order, and read the gradients of w0, b0 and w1 off it.

    Wherever a tap of z is missing, the first convolution's bias is not: b0 meets every row's gradient, grad_b1.
    """
    TAPS: tl.constexpr = K0 + K1 - 1
    head = tl.program_id(0)
    inputs = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    outputs = tl.arange(0, LANES)
    within = inputs < D
    inside = (outputs < D)[:, None] & within[None, :]
    channels = head * D + inputs
    is_key = head >= NUM_QUERY_HEADS
    heads_here = tl.where(is_key, NUM_KEY_HEADS, NUM_QUERY_HEADS)
    first_part = tl.where(is_key, NUM_QUERY_HEADS * query_splits - NUM_QUERY_HEADS, 0) + head
    splits = tl.where(is_key, key_splits, query_splits)
    grad_y = tl.load(grad_b1 + head * D + outputs, mask=outputs < D, other=0.0)
    bias = tl.load(b0 + channels, mask=within, other=0.0).to(tl.float32)
    w0_sums, w1_sums = (), ()
    for _ in tl.static_range(K0):
        w0_sums = w0_sums + (tl.zeros((CHANNELS,), tl.float32),)
    for _ in tl.static_range(K1):
        w1_sums = w1_sums + (grad_y[:, None] * bias[None, :],)
    for tap in tl.static_range(TAPS):
        x = tl.zeros((LANES, CHANNELS), tl.float32)
        for split in range(0, splits):
            part = (first_part + split * heads_here).to(tl.int64)
            x += tl.load(
                x_parts + (part * TAPS + tap) * D * D + outputs[:, None] * D + inputs[None, :], mask=inside, other=0.0
            )
        w0_next, w1_next = (), ()
        for later in tl.static_range(K1):
            part_w1 = w1_sums[later]
            if tap - later >= 0 and tap - later < K0:
                factor = tl.load(w0 + channels * K0 + (K0 - 1 - (tap - later)), mask=within, other=0.0)
                part_w1 += x * factor.to(tl.float32)[None, :]
            w1_next = w1_next + (part_w1,)
        for earlier in tl.static_range(K0):
            part_w0 = w0_sums[earlier]
            if tap - earlier >= 0 and tap - earlier < K1:
                weight = transposed_tap(w1, head, inputs, tap - earlier, D, K1, LANES)
                part_w0 += tl.sum(x * weight, axis=0)
            w0_next = w0_next + (part_w0,)
        w0_sums, w1_sums = w0_next, w1_next
    grad_bias = tl.zeros((CHANNELS,), tl.float32)
    for later in tl.static_range(K1):
        row = head.to(tl.int64) * (K1 * D) + (K1 - 1 - later) * D + inputs
        tl.store(grad_w1 + row[None, :] * D + outputs[:, None], w1_sums[later], mask=inside)
        grad_bias += tl.sum(transposed_tap(w1, head, inputs, later, D, K1, LANES) * grad_y[:, None], axis=0)
    tl.store(grad_b0 + channels, grad_bias, mask=within)
    for earlier in tl.static_range(K0):
        tl.store(grad_w0 + channels * K0 + (K0 - 1 - earlier), w0_sums[earlier], mask=within)
