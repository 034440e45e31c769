"""What a layer asks of the sequence that it sees a part of.

A layer computes on local rows. Two things cross rows, the rows before each local chunk (the halo of the convolutions
and of the value shift) and attention, and both go through this object: a plan of ``hydra_dist.context`` for a sequence
over many ranks, a cache when decoding, or ``WholeSequence`` on one device.
"""

from collections.abc import Sequence as Listing
from typing import Protocol

import torch
from torch import Tensor

from hydra_dist.attention import Mask, attention


class LocalSequence(Protocol):
    """Local rows of a sequence: who they are, and what comes to them from elsewhere."""

    @property
    def positions(self) -> Tensor:
        """[S] global position of each local row."""

    @property
    def document_starts(self) -> Tensor | None:
        """[B, S] position of the first row of each row's document; None: one document."""

    @property
    def ages(self) -> Tensor | None:
        """[B, S] int32, rows of its document before each row; None: one document."""

    @property
    def chunk_lengths(self) -> Listing[int]:
        """Local rows are these many runs of consecutive positions, one after another."""

    @property
    def halo_handle(self) -> int | None:
        """For operators that fetch rows of other ranks themselves and work meanwhile: names the plan; None: ``halo``
        has them without waiting."""

    def halo(self, parts: Listing[tuple[Tensor, int]]) -> Listing[Tensor | None]:
        """For each (tensor [B, S, C], rows): the rows before each chunk [B, chunks, rows, C], zero outside of the
        document of the chunk's first row; None where all of them are zero."""

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = True,
        window: int | None = None,
        logit_bound: float | None = None,
    ) -> Tensor:
        """Attention of local rows over the whole sequence, [B, S, H, D] -> [B, S, Hq, D].

        ``logit_bound`` says what no |q k| / sqrt(D) passes, for whoever can make use of it; None: unknown.
        """


class WholeSequence:
    """One device, one document, positions from 0."""

    document_starts = None
    ages = None
    halo_handle = None

    def __init__(self, length: int, device: torch.device) -> None:
        self.positions = torch.arange(length, device=device)
        self.chunk_lengths = (length,)

    def halo(self, parts: Listing[tuple[Tensor, int]]) -> Listing[Tensor | None]:
        return [None] * len(parts)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = True,
        window: int | None = None,
        logit_bound: float | None = None,
    ) -> Tensor:
        return attention(q, k, v, mask=Mask(causal=causal, window=window))[0]
