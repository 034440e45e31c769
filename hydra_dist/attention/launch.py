"""What one call of an attention kernel computes: a tile, or a whole mask where the kernel knows that form of mask.

Masks come in forms. Every kernel knows a tile: all pairs, or the causal half of a square. Some know a sliding window or
packed documents as well, and a few any mask. What a kernel does not know is cut into tiles
(``hydra_dist.costs.tiles``), one call each, whose results are merged; a window of 64 over 16,384 rows is hundreds.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hydra_dist.attention.band import Band
from hydra_dist.attention.mask import Mask

Form = Literal["tile", "edge", "square", "rectangle", "window", "documents", "any"]
"""Tiles: ``tile`` is all pairs or the causal half of a square, ``edge`` lies along a window's edge.

Whole masks: ``square`` is all pairs or the causal half of as many queries as keys, ``rectangle`` all pairs of others,
such as one new token and the keys so far. ``window`` is causal with a sliding window, over rows in order, the last
query at the position of the last key. ``documents`` are packed one after another, with the same rows as queries and
keys, causal or not, with a window or without. ``any`` is any ``Mask``.
"""


@dataclass(frozen=True)
class Documents:
    """Documents that lie one after another in [B * S] rows; none of them reaches from one batch row into the next."""

    offsets: Tensor
    """int32 [number + 1], on the device: the first row of each document, then B * S."""
    longest: int
    """Rows of the longest one."""


@dataclass(frozen=True)
class Launch:
    """Which of the keys each query of one call sees, and the factor on the scores.

    Attributes:
        scale: factor on the scores.
        causal: as many queries as keys, and query i sees keys 0..i.
        band: query and key are at most so far apart; instead of ``causal``.
        documents: the above holds within each document.
        mask: the whole mask in its general form, for kernels that know any; the three above are then not set.
        out_dtype: dtype of ``out`` where the kernel can choose. None: fp32 or wider.
    """

    scale: float
    causal: bool = False
    band: Band | None = None
    documents: Documents | None = None
    mask: Mask | None = None
    out_dtype: torch.dtype | None = None

    def window(self, q_length: int, k_length: int) -> tuple[int, int]:
        """FlashAttention's (left, right): query i sees the keys from i + d - left to i + d + right, -1 for no limit,
        where d = k_length - q_length brings the last query to the last key."""
        if self.band is None:
            return -1, 0 if self.causal else -1
        right = self.band.offset - (k_length - q_length)
        left = -1 if self.band.window is None else self.band.window - 1 - right
        if right < 0 or (self.band.window is not None and left < 0):
            raise ValueError(f"{self.band}: the last query must lie at the last key or up to window - 1 after it")
        return left, right


class Need(NamedTuple):
    """What a call of attention asks of a backend.

    ``form`` is that of the whole mask, or None where there are only tiles; ``edges`` says whether some of its tiles lie
    along a window's edge, ``few`` whether there are at most a few for each pair of runs of consecutive positions, and
    ``num_span_pairs`` counts these pairs.
    """

    form: Form | None
    edges: bool = False
    few: bool = True
    num_span_pairs: int = 1


def need_of(mask: Mask, q_length: int, k_length: int) -> Need:
    """What a mask asks for. It follows from lengths and positions alone, never from where documents start."""
    q_spans, k_spans = mask.spans(q_length, k_length)
    form: Form = "any"
    window = mask.window
    if len(q_spans) == len(k_spans) == 1:
        distance = q_spans[0].position - k_spans[0].position
        if window is not None and q_length + distance <= window:
            window = None  # no key is that far away
        aligned = distance == k_length - q_length >= 0
        if mask.document_starts is not None:
            if mask.k_document_starts is None and q_length == k_length and distance == 0:
                form = "documents"
        elif window is not None:
            form = "window" if aligned else "any"
        elif not _looks_back(mask) or distance >= k_length - 1 or (aligned and q_length == k_length):
            form = "square" if q_length == k_length else "rectangle"
    few = mask.document_starts is None and window is None
    return Need(form, window is not None, few, len(q_spans) * len(k_spans))


def launch_of(
    mask: Mask, form: Form, q: Tensor, k: Tensor, scale: float, out_dtype: torch.dtype | None = None
) -> Launch:
    """The whole mask as one call, for a mask of that form.

    Raises:
        ValueError: document starts that contradict the positions.
    """
    q_length, k_length = q.shape[1], k.shape[1]
    if form == "any":
        return Launch(scale, mask=mask, out_dtype=out_dtype)
    q_spans, k_spans = mask.spans(q_length, k_length)
    distance = q_spans[0].position - k_spans[0].position
    documents = None
    if form == "documents":
        starts = mask.document_positions(q_length, k_length)
        assert starts is not None
        documents = _packed(starts, q_spans[0].position, q_length, q.shape[0], q.device)
    if mask.window is not None and q_length + distance > mask.window:
        return Launch(scale, False, Band(q_length, k_length, distance, mask.window), documents, out_dtype=out_dtype)
    everything = not _looks_back(mask) or (documents is None and distance >= k_length - 1)
    return Launch(scale, not everything, None, documents, out_dtype=out_dtype)


def _looks_back(mask: Mask) -> bool:
    return mask.causal or mask.window is not None


@lru_cache(maxsize=16)
def _packed(
    starts: tuple[tuple[int, ...], ...], position: int, length: int, batch_size: int, device: torch.device
) -> Documents:
    """Each layer, forward and backward, asks for the documents of the same batch."""
    edges: list[int] = []
    for batch in range(batch_size):
        inside = [s - position for s in starts[batch if len(starts) > 1 else 0] if position < s < position + length]
        edges.extend(batch * length + row for row in (0, *inside))
    edges.append(batch_size * length)
    longest = max(b - a for a, b in pairwise(edges))
    return Documents(torch.tensor(edges, dtype=torch.int32, device=device), longest)
