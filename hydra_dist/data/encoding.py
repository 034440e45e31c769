"""From documents to the ids that a shard holds: ``<|begin|>``, the text's tokens, ``<|end|>``."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from hydra_dist.data.documents import Document
from hydra_dist.data.tokenizer import Tokenizer

_BATCH_BYTES = 1 << 22


def blocks(documents: Iterable[Document], text_bytes: int) -> Iterator[list[Document]]:
    """Consecutive documents in lists of about ``text_bytes`` of text: closed by the one that reaches it."""
    block: list[Document] = []
    size = 0
    for document in documents:
        block.append(document)
        size += document.text_bytes
        if size >= text_bytes:
            yield block
            block, size = [], 0
    if block:
        yield block


def encode_documents(
    documents: Sequence[Document], tokenizer: Tokenizer
) -> Iterator[tuple[Document, np.ndarray, np.ndarray | None]]:
    """Each document with its ids, special tokens included, and the bytes of each where the ids do not tell them."""
    for batch in blocks(documents, _BATCH_BYTES):
        texts = [document.text for document in batch]
        if tokenizer.is_byte_level:
            lengths = tokenizer.token_bytes
            for document, ids in zip(batch, tokenizer.encode_batch(texts), strict=True):
                if int(lengths[ids].sum()) != document.text_bytes:
                    raise ValueError(f"{document.name}: its tokens' bytes are not its text's {document.text_bytes}")
                yield document, _enclose(ids, tokenizer.begin_id, tokenizer.end_id), None
        else:
            for document, (ids, counts) in zip(batch, tokenizer.encode_batch_with_bytes(texts), strict=True):
                rest = document.text_bytes - int(counts.sum())  # of a text without any token; <|end|> carries it
                yield document, _enclose(ids, tokenizer.begin_id, tokenizer.end_id), _enclose(counts, 0, rest)


def _enclose(values: np.ndarray, first: int, last: int) -> np.ndarray:
    return np.concatenate([[first], values, [last]])
