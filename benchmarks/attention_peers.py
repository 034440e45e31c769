"""Attention layers that are measured against each other, and what runs inside them.

A layer asks its sequence for attention, so a peer gets the implementation it is to be measured with through that
object, and everything else in it stays the same.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.saved_bytes import saved_bytes
from hydra_dist.attention import Mask, attention
from hydra_dist.config import ModelConfig
from hydra_dist.costs.flops import forward_flops, score_pairs
from hydra_dist.model import CCGQA, GQA, initialize
from hydra_dist.model.rope import Rope, rope_tables
from hydra_dist.model.sequence import WholeSequence

Layer = TypeVar("Layer", CCGQA, GQA)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention of q [B, S, Hq, D] over k and v [B, S, Hk, D] with scale 1 / sqrt(D)."""


class SequenceWith(WholeSequence):
    """One device, one document, and the attention that it is given."""

    def __init__(self, length: int, device: torch.device, attend: Attend) -> None:
        super().__init__(length, device)
        self._attend = attend

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = True,
        window: int | None = None,
        logit_bound: float | None = None,
    ) -> Tensor:
        if not causal or window is not None:
            raise ValueError("layers are compared with causal attention over the whole sequence")
        return self._attend(q, k, v)


def ours(backend: str) -> Attend:
    """``hydra_dist.attention`` with one backend."""
    return partial(_ours, backend=backend)


def _ours(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    return attention(q, k, v, mask=Mask(causal=True), backend=backend)[0]


def flash_attention_2(device: torch.device) -> tuple[str, Attend]:
    """FlashAttention-2 and where it comes from: the package where it is installed, else PyTorch's flash operator."""
    if device.type == "cuda":
        try:
            package = importlib.import_module("flash_attn")
        except ImportError:
            pass
        else:
            return "package flash-attn", partial(package.flash_attn_func, causal=True)
    return "PyTorch's flash operator", _torchs_flash


def _torchs_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def heads_of(text: str) -> tuple[int, int]:
    """``8/2`` -> 8 query and 2 key heads."""
    queries, keys = text.split("/")
    return int(queries), int(keys)


def ccgqa(hidden_size: int, heads: tuple[int, int], head_dim: int, device: torch.device, dtype: torch.dtype) -> CCGQA:
    """A CCGQA layer with starting values."""
    return _ready(CCGQA(hidden_size, *heads, head_dim), hidden_size, device, dtype)


def multi_head(hidden_size: int, head_dim: int, device: torch.device, dtype: torch.dtype, rotated: bool = True) -> GQA:
    """Multi-head attention whose heads fill the width; without rotation nothing stands before its attention."""
    heads = hidden_size // head_dim
    layer = GQA(hidden_size, heads, heads, head_dim, rope_dim=None if rotated else 0)
    return _ready(layer, hidden_size, device, dtype)


def _ready(layer: Layer, hidden_size: int, device: torch.device, dtype: torch.dtype) -> Layer:
    initialize(layer, 0, init_std=hidden_size**-0.5)
    return layer.to(device, dtype)


def rope_of(layer: CCGQA | GQA, length: int, device: torch.device) -> Rope | None:
    """The tables that a model shares among its layers."""
    return rope_tables(torch.arange(length, device=device), layer.rope_dim, layer.rope_theta, torch.float32)


def kept_bytes(layer: CCGQA | GQA, batch_size: int, length: int, attend: Attend | None = None) -> int:
    """Bytes that one forward keeps for its backward, but for the layer's input, parameters and rotation tables.

    ``attend`` None: what the layer takes by itself.
    """
    weight = layer.output.weight
    x = torch.randn(batch_size, length, weight.shape[0], device=weight.device, dtype=weight.dtype, requires_grad=True)
    seq = None if attend is None else SequenceWith(length, weight.device, attend)
    rope = rope_of(layer, length, weight.device)
    return saved_bytes(lambda: layer(x, seq, rope), [x, *(rope or ()), *layer.parameters()])


@dataclass(frozen=True)
class KeptBytes:
    """What a CCGQA layer and multi-head attention of the same width keep for backward."""

    what: str
    ours: int
    theirs: int

    @property
    def ratio(self) -> float:
        """How many times fewer bytes CCGQA keeps."""
        return self.theirs / self.ours


def kept_beside_multi_head(
    hidden_size: int,
    heads: tuple[int, int],
    head_dim: int,
    batch_size: int,
    lengths: Iterable[int],
    device: torch.device,
) -> list[KeptBytes]:
    """Bytes kept in bf16 at each sequence length, multi-head attention through FlashAttention-2."""
    ours = ccgqa(hidden_size, heads, head_dim, device, torch.bfloat16)
    theirs = multi_head(hidden_size, head_dim, device, torch.bfloat16)
    _, flash = flash_attention_2(device)
    name = f"{heads[0]}/{heads[1]} heads, kept for backward, {batch_size} x"
    return [
        KeptBytes(
            f"{name} {length} tokens",
            kept_bytes(ours, batch_size, length),
            kept_bytes(theirs, batch_size, length, flash),
        )
        for length in lengths
    ]


def layer_flops(layer: CCGQA | GQA, length: int) -> tuple[int, int]:
    """Operations of forward and of backward of one sequence, as ``costs.flops`` counts them.

    Backward is twice forward; attention's is two and a half times, because it computes the scores again.
    """
    config = ModelConfig(
        vocab_size=1,
        num_layers=1,
        hidden_size=layer.output.weight.shape[0],
        attention="ccgqa" if isinstance(layer, CCGQA) else "gqa",
        head_dim=layer.head_dim,
        num_query_heads=layer.num_query_heads,
        num_key_heads=layer.num_key_heads,
    )
    flops = forward_flops(config)
    products = (flops.projections + flops.convolutions) * length
    attention = flops.attention * score_pairs(length)
    return products + attention, 2 * products + 5 * attention // 2
