"""Attention where one device holds the whole sequence: the mask goes to the backend as it is, in one piece."""

import torch
from torch import Tensor

from hydra_dist.attention import merge_rule


class Single:
    """One device; the interface of ``Ring``.

    Args:
        document_starts: [B, S], for each row the position at which its document begins; None for one document.
    """

    def __init__(self, document_starts: Tensor | None) -> None:
        self.document_starts = document_starts

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        window: int | None,
        scale: float,
        logit_bound: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """out [B, S, Hq, D] in q's dtype and lse [B, Hq, S] in fp32 or wider. There is nothing to merge that a bound
        on the logits would make cheaper; it is only checked."""
        merge_rule(logit_bound)
        mask = self._mask(q.device)
        found: tuple[Tensor, Tensor] = torch.ops.hydra_dist.attention(
            q, k, v, *mask, causal, window, scale, "auto", q.dtype
        )
        return found

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        window: int | None,
        scale: float,
        key_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q in its dtype, and of k and v in ``key_dtype``."""
        mask = self._mask(q.device)
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.hydra_dist.attention_backward(
            grad_out, q, k.to(key_dtype), v.to(key_dtype), out, lse, *mask, causal, window, scale, "auto"
        )
        return grads

    def _mask(self, device: torch.device) -> tuple[Tensor | None, None, None, None]:
        """Document starts of queries, of keys where they are others, and positions where they do not count from 0."""
        if self.document_starts is not None:
            self.document_starts = self.document_starts.to(device)
        return self.document_starts, None, None, None
