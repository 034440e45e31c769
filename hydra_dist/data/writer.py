"""Writing one shard: flat token ids, the places where documents start, and a hash of both.

``train-00000.bin`` holds the ids without a header, little-endian uint16 or uint32; ``train-00000.idx.npy`` holds
int64 [documents + 1], the first token of each document and the end of the last; ``train-00000.bytes.bin``, only for
tokenizers that are not byte-level, holds uint32 [tokens], the bytes of text that each token stands for.
"""

from pathlib import Path

import numpy as np

from hydra_dist.data.files import AtomicFile, npy_bytes, sync_directory
from hydra_dist.data.manifest import FileRecord, ShardRecord


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """uint16 where every id fits, else uint32; little-endian on every machine."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def shard_names(split: str, number: int) -> tuple[str, str, str]:
    """File names of a shard: tokens, index, bytes per token."""
    stem = f"{split}-{number:05d}"
    return f"{stem}.bin", f"{stem}.idx.npy", f"{stem}.bytes.bin"


class ShardWriter:
    """Takes documents one by one; nothing has its final name before ``finish``.

    Args:
        number: of the shard within its split.
        block: the shuffle buffer whose documents it holds.
        with_bytes: whether the bytes of text of each token are written.
    """

    def __init__(self, directory: Path, split: str, number: int, block: int, vocab_size: int, *, with_bytes: bool):
        data, self._index_name, token_bytes = shard_names(split, number)
        self._directory = directory
        self._block = block
        self._dtype = token_dtype(vocab_size)
        self._offsets = [0]
        self._text_bytes = 0
        self._data = AtomicFile(directory / data)
        try:
            self._bytes = AtomicFile(directory / token_bytes) if with_bytes else None
        except OSError:
            self._data.discard()
            raise

    @property
    def tokens(self) -> int:
        return self._offsets[-1]

    def add(self, ids: np.ndarray, text_bytes: int, token_bytes: np.ndarray | None = None) -> None:
        """Append a document: its ids with ``<|begin|>`` and ``<|end|>``, and its text's length in UTF-8 bytes."""
        self._data.write(ids.astype(self._dtype).tobytes())
        if self._bytes is not None:
            if token_bytes is None or len(token_bytes) != len(ids):
                raise ValueError("bytes per token are missing")
            self._bytes.write(token_bytes.astype("<u4").tobytes())
        self._offsets.append(self._offsets[-1] + len(ids))
        self._text_bytes += text_bytes

    def finish(self) -> ShardRecord:
        """Force the shard to disk under its final names."""
        index = AtomicFile(self._directory / self._index_name)
        try:
            index.write(npy_bytes(np.array(self._offsets, dtype="<i8")))
            index.commit()
        except BaseException:
            index.discard()
            raise
        for file in (self._bytes, self._data):
            if file is not None:
                file.commit()
        sync_directory(self._directory)
        return ShardRecord(
            block=self._block,
            tokens=self.tokens,
            documents=len(self._offsets) - 1,
            text_bytes=self._text_bytes,
            data=_record(self._data),
            index=_record(index),
            token_bytes=_record(self._bytes) if self._bytes is not None else None,
        )

    def discard(self) -> None:
        """Leave nothing of an unfinished shard behind."""
        for file in (self._bytes, self._data):
            if file is not None:
                file.discard()


def _record(file: AtomicFile) -> FileRecord:
    return FileRecord(name=file.path.name, size=file.size, sha256=file.sha256)
