"""One row of packed documents, and a batch of rows as the model takes it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hydra_dist.data.shards import Dataset

IGNORED = -100
"""The target of a position without a loss, as in torch's cross entropy."""


@dataclass(frozen=True)
class Batch:
    """Packed rows, before any sharding.

    Attributes:
        tokens: [B, S] int64.
        targets: [B, S] int64, the next token of the stream; -100 at the last token of a document, so that no loss
            crosses into the next one, and at padding.
        document_starts: [B, S] int64, the position within the row of the first token of each token's document; 0 for
            a document that began in an earlier row.
        row_text_bytes: [B] int64, bytes of text of each row's targets: what its loss is divided by for bits per byte.
    """

    tokens: Tensor
    targets: Tensor
    document_starts: Tensor
    row_text_bytes: Tensor

    @property
    def text_bytes(self) -> int:
        """Bytes of text of all targets of the batch."""
        return int(self.row_text_bytes.sum())


def pack_rows(dataset: Dataset, starts: Sequence[int], sequence_length: int) -> Batch:
    """Rows that start at the given positions of the stream; each reads one token more than it is long, for the targets.

    What lies beyond the end of the stream is padded: ``<|end|>`` tokens in a document of their own, without a target.
    A start at or beyond the last token gives a row of padding alone.
    """
    B, S = len(starts), sequence_length
    tokens = np.full((B, S), dataset.end_id, dtype=np.int64)
    targets = np.full((B, S), IGNORED, dtype=np.int64)
    document_starts = np.zeros((B, S), dtype=np.int64)
    text_bytes = np.zeros(B, dtype=np.int64)
    for row, start in enumerate(starts):
        rows = max(0, min(S, dataset.num_tokens - 1 - start))
        document_starts[row, rows:] = rows
        if rows == 0:
            continue
        stream = dataset.tokens(start, start + rows + 1)
        firsts = dataset.document_starts(start, start + rows + 1)
        follows = firsts[1:] == firsts[:-1]  # the next token belongs to the same document
        tokens[row, :rows] = stream[:-1]
        targets[row, :rows] = np.where(follows, stream[1:], IGNORED)
        document_starts[row, :rows] = np.maximum(firsts[:-1] - start, 0)
        text_bytes[row] = dataset.text_bytes_of(start + 1, start + rows + 1)[follows].sum()
    return Batch(*(torch.from_numpy(array) for array in (tokens, targets, document_starts, text_bytes)))
