"""Softmax attention as it stands on paper, forward and backward.

    P = softmax(scale Q K^T) over the allowed keys,  O = P V,  lse = log sum exp(scale Q K^T)

    dV = P^T dO,  dP = dO V^T,  dS = P * (dP - rowsum(dO * O)),  dQ = scale dS K,  dK = scale dS^T Q

It keeps the whole score matrix, so its memory grows with the square of the sequence: the truth that fast paths are
compared with, and the way out for devices and dtypes that they do not take. Everything is computed in the wider of
fp32 and the inputs' dtype.

Source: Vaswani et al. 2017 (arXiv 1706.03762), equation 1; Dao et al. 2022 (arXiv 2205.14135), appendix B.2.
"""

import torch
from torch import Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp.

    Args:
        q: [B, Sq, Hq, D].
        k, v: [B, Sk, Hk, D] with Hq a multiple of Hk; query heads h*Hq/Hk and on share key head h.
        allowed: bool, broadcastable to [B, Sq, Sk]: which keys each query sees. None: all of them.
        scale: factor on the scores.

    Returns:
        out [B, Sq, Hq, D] and lse [B, Hq, Sq]. A query that sees no key has out 0 and lse -inf.
    """
    q, k, v = _wide(q), _for_each_query_head(k, q), _for_each_query_head(v, q)
    scores = _scores(q, k, allowed, scale)
    lse = torch.logsumexp(scores, dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", _probabilities(scores, lse), v), lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, allowed: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; queries that see no key give and receive none.

    ``out`` [B, Sq, Hq, D] and ``lse`` [B, Hq, Sq] may stand for more keys than ``k`` and ``v`` hold. The result is then
    the part of the gradients that comes from these keys.
    """
    num_key_heads = k.shape[2]
    q, k, v, grad_out = _wide(q), _for_each_query_head(k, q), _for_each_query_head(v, q), _wide(grad_out)
    p = _probabilities(_scores(q, k, allowed, scale), lse.to(q.dtype))
    delta = (grad_out * _wide(out)).sum(-1).transpose(1, 2)  # [B, Hq, Sq]
    grad_p = torch.einsum("bqhd,bkhd->bhqk", grad_out, v)
    grad_scores = p * (grad_p - delta.unsqueeze(-1)) * scale
    grad_q = torch.einsum("bhqk,bkhd->bqhd", grad_scores, k)
    grad_k = torch.einsum("bhqk,bqhd->bkhd", grad_scores, q)
    grad_v = torch.einsum("bhqk,bqhd->bkhd", p, grad_out)
    return grad_q, sum_groups(grad_k, num_key_heads), sum_groups(grad_v, num_key_heads)


def sum_groups(grad: Tensor, num_key_heads: int) -> Tensor:
    """[B, S, Hq, D] -> [B, S, Hk, D]: the gradient of a key head is the sum over the query heads that share it."""
    return grad.unflatten(2, (num_key_heads, grad.shape[2] // num_key_heads)).sum(3)


def repeat_groups(x: Tensor, num_query_heads: int) -> Tensor:
    """[B, S, Hk, D] -> [B, S, Hq, D]: each key head once for every query head that shares it."""
    groups = num_query_heads // x.shape[2]
    return x if groups == 1 else x.repeat_interleave(groups, dim=2)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _for_each_query_head(x: Tensor, q: Tensor) -> Tensor:
    return repeat_groups(_wide(x), q.shape[2])


def _scores(q: Tensor, k: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    return scores if allowed is None else scores.masked_fill(~allowed.unsqueeze(-3), -torch.inf)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), with exact zeros for queries that see no key, where -inf - -inf would be NaN."""
    lse = lse.unsqueeze(-1)
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0))
