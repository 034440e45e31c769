"""Next-token cross entropy of a long sequence, a chunk of tokens at a time.

The logits of a chunk are made, turned into the loss and into their own gradient, multiplied into the gradients of the
rows and of the head, and dropped: those of the whole sequence (a million tokens x the vocabulary) exist neither forward
nor backward, and nothing is computed twice. The gradients are ready when forward returns; backward scales them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hydra_dist.model.products import add_product, matmul_dtype

NO_TARGET = -100
"""Target of a token that has no loss, as in ``torch.nn.functional.cross_entropy``."""


def chunked_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
    """Sum over tokens of -log softmax(weight x)[target], in nats.

    Args:
        x: [B, S, E].
        weight: [V, E], the output head.
        targets: [B, S] int; ``NO_TARGET`` for tokens without loss.
        chunk_size: tokens whose logits exist at once.

    Matrix products run in autocast's dtype where autocast is on, else in x's; softmax, sum and the gradient of the
    head accumulate in fp32 (fp64 for fp64). Differentiable once, in x and weight.

    Returns:
        A scalar in fp32 (fp64 for fp64); 0 with zero gradients where no token has a target.
    """
    _check(x, weight, targets, chunk_size)
    grad_x, grad_weight = (torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, weight))
    return _ChunkedCrossEntropy.apply(x, weight, targets, chunk_size, grad_x, grad_weight)


@torch.no_grad()
def chunked_token_nll(x: Tensor, weight: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
    """-log softmax(weight x)[target] of every token, [B, S] in nats, 0 where it has no target; without gradient."""
    _check(x, weight, targets, chunk_size)
    dtype = matmul_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        head = weight.to(dtype)
        rows = zip(x.flatten(0, 1).split(chunk_size), targets.flatten().split(chunk_size), strict=True)
        nll = [_nll_and_softmax(_logits(part.to(dtype), head), target) for part, target in rows]
    return torch.cat(nll).view(targets.shape)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunk_size: int, needs_x: bool, needs_weight: bool
    ) -> Tensor:
        dtype, wide = matmul_dtype(x), torch.promote_types(x.dtype, torch.float32)
        rows, flat = x.flatten(0, 1), targets.flatten()
        grad_x = torch.empty_like(rows) if needs_x else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs_weight else None
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            head = weight.to(dtype)
            for start in range(0, rows.shape[0], chunk_size):
                part, target = rows[start : start + chunk_size].to(dtype), flat[start : start + chunk_size]
                logits = _logits(part, head)
                total += _nll_and_softmax(logits, target).sum(dtype=torch.float64)
                if grad_x is None and grad_weight is None:
                    continue
                grad = _minus_target(logits, target).to(dtype)
                if grad_x is not None:
                    grad_x[start : start + chunk_size] = grad @ head
                if grad_weight is not None:
                    add_product(grad_weight, grad.t(), part)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.shape, ctx.weight_dtype = x.shape, weight.dtype
        return total.to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        if grad_x is not None:
            grad_x = (grad_x * grad).to(grad_x.dtype).view(ctx.shape)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_x, grad_weight, None, None, None, None


def _logits(rows: Tensor, head: Tensor) -> Tensor:
    """[T, E], [V, E] -> [T, V] in fp32 or wider."""
    if rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(rows, head.t(), out_dtype=torch.float32)
    logits = rows @ head.t()
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _nll_and_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    """[T, V], [T] -> the loss [T], 0 without a target; the softmax is written over the logits."""
    absent = targets == NO_TARGET
    largest = logits.amax(-1, keepdim=True)
    logits -= largest
    chosen = logits.gather(-1, targets.masked_fill(absent, 0).unsqueeze(-1))
    total = logits.exp_().sum(-1, keepdim=True)
    logits /= total
    return (total.log() - chosen).squeeze(-1).masked_fill(absent, 0.0)


def _minus_target(softmax: Tensor, targets: Tensor) -> Tensor:
    """The loss's gradient with respect to the logits, in place; zero rows without a target."""
    absent = targets == NO_TARGET
    index = targets.masked_fill(absent, 0).unsqueeze(-1)
    softmax.scatter_add_(-1, index, torch.full_like(index, -1, dtype=softmax.dtype))
    return softmax.masked_fill_(absent.unsqueeze(-1), 0.0)


def _check(x: Tensor, weight: Tensor, targets: Tensor, chunk_size: int) -> None:
    if targets.shape != x.shape[:2] or weight.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}: "
            "expected [B, S, E], [V, E], [B, S]"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} is not positive")


class Head(nn.Module):
    """The output head, its weight alone: the loss is computed where the weight is, and where ZeRO-3 gathers it."""

    def __init__(self, vocab_size: int, hidden_size: int, chunk_size: int) -> None:
        super().__init__()
        self.chunk_size = chunk_size
        self.weight: Tensor = nn.Parameter(torch.zeros(vocab_size, hidden_size))

    def forward(self, x: Tensor, targets: Tensor | None = None, reduction: str = "sum") -> Tensor:
        """[B, S, E] -> logits [B, S, V]; with ``targets`` [B, S] their loss, summed or (``none``) [B, S]."""
        if targets is None:
            return nn.functional.linear(x, self.weight)
        if reduction == "sum":
            return chunked_cross_entropy(x, self.weight, targets, self.chunk_size)
        if reduction == "none":
            return chunked_token_nll(x, self.weight, targets, self.chunk_size)
        raise ValueError(f'reduction "{reduction}" is neither "sum" nor "none"')
