"""Reading prepared data: one split as a single stream of tokens, memory-mapped.

A split is the concatenation of its shards. Positions below are positions of that stream; a document never crosses a
shard, so every shard starts with the start of a document.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from hydra_dist.data.files import sha256_of
from hydra_dist.data.manifest import (
    MANIFEST,
    SPLITS,
    FileRecord,
    Manifest,
    ShardRecord,
    read_record,
)
from hydra_dist.data.tokenizer import Tokenizer, load_tokenizer
from hydra_dist.data.writer import token_dtype
from hydra_dist.errors import ConfigError, RunError, nearest

_CHECKED_TOKENS = 1 << 22


@dataclass(frozen=True)
class _Shard:
    record: ShardRecord
    tokens: np.ndarray
    index: np.ndarray
    token_bytes: np.ndarray | None


class Dataset:
    """One split of prepared data.

    Sizes are checked when it is opened; ``verify=True`` (or ``verify()``) also reads every file and compares its
    sha256, which takes about a second a gigabyte.

    Attributes:
        vocab_size: rows of the embedding table that the ids need.
        begin_id, end_id: the ids of ``<|begin|>`` and ``<|end|>``.
        num_tokens, num_documents: of the split; tokens include the two special ones of each document.
        text_bytes: UTF-8 bytes of the split's text.

    Raises:
        ConfigError: no prepared data in the directory, an unknown or empty split.
        RunError: a manifest or file that is damaged, missing or of another version; names the file.
    """

    def __init__(self, directory: str | Path, split: str = "train", *, verify: bool = False):
        self.directory = Path(directory)
        self.split = split
        if split not in SPLITS:
            raise ConfigError(f"split {split!r} does not exist{nearest(split, SPLITS)}; train and eval do")
        self.manifest = read_manifest(self.directory)
        records = self.manifest.shards(split)
        if not records:
            raise ConfigError(
                f"{self.directory}: the {split} split is empty (--eval-fraction was "
                f"{self.manifest.fingerprint.eval_fraction}, of {self._documents_of_all()} documents); prepare again "
                f"into another --output with a {'larger' if split == 'eval' else 'smaller'} --eval-fraction"
            )
        self._remedy = f"delete {self.directory} and run `hydra-dist data prepare` again"
        self._check_file(self.manifest.tokenizer.file)
        self._shards = [self._open(record) for record in records]
        self._starts = [0, *np.cumsum([record.tokens for record in records]).tolist()]
        self.vocab_size = self.manifest.tokenizer.vocab_size
        self.begin_id = self.manifest.tokenizer.begin_id
        self.end_id = self.manifest.tokenizer.end_id
        self.num_tokens: int = self._starts[-1]
        self.num_documents = self.manifest.total(split, "documents")
        self.text_bytes = self.manifest.total(split, "text_bytes")
        if verify:
            self.verify()

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizers JSON file that the data was written with."""
        return self.directory / self.manifest.tokenizer.file.name

    @property
    def tokenizer_sha256(self) -> str:
        """sha256 of that file, as the manifest has it."""
        return self.manifest.tokenizer.file.sha256

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the data was written with, checked against the manifest."""
        self._check_sum(self.manifest.tokenizer.file)
        return load_tokenizer(self.tokenizer_path)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Token ids of positions start..stop-1, int64; a copy.

        Raises:
            RunError: an id beyond the vocabulary; names the shard.
        """
        out = self._room(start, stop)
        for shard, at, a, b in self._parts(start, stop):
            part = shard.tokens[a:b]
            if part.size and int(part.max()) >= self.vocab_size:
                raise RunError(self._beyond_vocabulary(shard, a + int(part.argmax())))
            out[at : at + b - a] = part
        return out

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """For positions start..stop-1, the position of the first token of each one's document, int64."""
        out = self._room(start, stop)
        for shard, at, a, b in self._parts(start, stop):
            first = int(np.searchsorted(shard.index, a, side="right")) - 1
            last = int(np.searchsorted(shard.index, b, side="left"))
            bounds = np.array(shard.index[first : last + 1])
            lengths = np.diff(np.clip(bounds, a, b))
            shard_start = start + at - a
            out[at : at + b - a] = np.repeat(bounds[:-1] + shard_start, lengths)
        return out

    def text_bytes_of(self, start: int, stop: int) -> np.ndarray:
        """Bytes of text that the tokens at positions start..stop-1 stand for, int64; 0 for special tokens."""
        if self.manifest.tokenizer.byte_level:
            return self._vocabulary_bytes[self.tokens(start, stop)]
        out = self._room(start, stop)
        for shard, at, a, b in self._parts(start, stop):
            assert shard.token_bytes is not None, "checked when the shard was opened"
            out[at : at + b - a] = shard.token_bytes[a:b]
        return out

    def verify(self) -> None:
        """Read every file of the split and compare it with the manifest.

        Raises:
            RunError: a checksum, document order or token id that is wrong; names the file.
        """
        self._check_sum(self.manifest.tokenizer.file)
        for shard in self._shards:
            for file in shard.record.files:
                self._check_sum(file)
            if (np.diff(shard.index) < 2).any():
                raise RunError(f"{self.directory / shard.record.index.name}: documents out of order; {self._remedy}")
            for a in range(0, shard.record.tokens, _CHECKED_TOKENS):
                part = shard.tokens[a : a + _CHECKED_TOKENS]
                if int(part.max()) >= self.vocab_size:
                    raise RunError(self._beyond_vocabulary(shard, a + int(part.argmax())))

    @cached_property
    def _vocabulary_bytes(self) -> np.ndarray:
        return self.tokenizer.token_bytes.astype(np.int64)

    def _room(self, start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"{start}..{stop} is not within 0..{self.num_tokens}")
        return np.empty(stop - start, dtype=np.int64)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[_Shard, int, int, int]]:
        """(shard, offset in the result, first and last+1 token in the shard) of the shards that a range touches."""
        number = bisect_right(self._starts, start) - 1
        at = start
        while at < stop:
            base, end = self._starts[number], min(stop, self._starts[number + 1])
            yield self._shards[number], at - start, at - base, end - base
            at, number = end, number + 1

    def _open(self, record: ShardRecord) -> _Shard:
        dtype = token_dtype(self.manifest.tokenizer.vocab_size)
        if dtype.name != self.manifest.dtype:
            raise RunError(
                f"{self.directory / MANIFEST}: dtype {self.manifest.dtype} does not go with a vocabulary of "
                f"{self.manifest.tokenizer.vocab_size}; {self._remedy}"
            )
        self._check_file(record.data, record.tokens * dtype.itemsize)
        self._check_file(record.index)
        tokens = np.memmap(self.directory / record.data.name, dtype=dtype, mode="r")
        token_bytes = None
        if record.token_bytes is not None:
            self._check_file(record.token_bytes, record.tokens * 4)
            token_bytes = np.memmap(self.directory / record.token_bytes.name, dtype="<u4", mode="r")
        elif not self.manifest.tokenizer.byte_level:
            raise RunError(f"{self.directory / MANIFEST}: {record.data.name} lacks its token bytes; {self._remedy}")
        return _Shard(record, tokens, self._open_index(record), token_bytes)

    def _open_index(self, record: ShardRecord) -> np.ndarray:
        path = self.directory / record.index.name
        try:
            index: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise RunError(f"{path}: altered, no index can be read from it ({error}); {self._remedy}") from error
        if index.dtype != np.dtype("<i8") or index.shape != (record.documents + 1,):
            raise RunError(f"{path}: altered, {record.documents} documents are expected; {self._remedy}")
        if index[0] != 0 or index[-1] != record.tokens:
            raise RunError(f"{path}: altered, it does not span the {record.tokens} tokens; {self._remedy}")
        return index

    def _check_file(self, file: FileRecord, size: int | None = None) -> None:
        path = self.directory / file.name
        if size is not None and size != file.size:
            raise RunError(f"{self.directory / MANIFEST}: {file.name} of {file.size} bytes should be {size}")
        try:
            found = path.stat().st_size
        except OSError as error:
            raise RunError(f"{path}: listed in the manifest, but cannot be read ({error.strerror})") from error
        if found != file.size:
            what = "truncated" if found < file.size else "altered"
            raise RunError(f"{path}: {what}, {found} bytes instead of {file.size}; {self._remedy}")

    def _check_sum(self, file: FileRecord) -> None:
        path = self.directory / file.name
        self._check_file(file)
        try:
            found = sha256_of(path)
        except OSError as error:
            raise RunError(f"{path}: cannot be read ({error.strerror or error})") from error
        if found != file.sha256:
            raise RunError(f"{path}: altered, its sha256 is not the manifest's; {self._remedy}")

    def _beyond_vocabulary(self, shard: _Shard, position: int) -> str:
        return (
            f"{self.directory / shard.record.data.name}: token id {int(shard.tokens[position])} at {position} "
            f"is beyond the vocabulary of {self.vocab_size}; {self._remedy}"
        )

    def _documents_of_all(self) -> int:
        return sum(self.manifest.total(split, "documents") for split in SPLITS)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of prepared data.

    Raises:
        ConfigError: the directory does not exist or holds no finished data; says what to run.
        RunError: the manifest is damaged or of another version.
    """
    command = f"hydra-dist data prepare --input stdlib --output {directory} --tokenizer train:8192"
    if not (directory / MANIFEST).is_file():
        if not directory.is_dir():
            problem = "no such directory"
        elif (directory / "progress.json").is_file():
            problem = "its preparation was not finished; run the same `hydra-dist data prepare` again to go on"
            raise ConfigError(f"{directory}: {problem}")
        else:
            problem = f"holds no prepared data (no {MANIFEST})"
        raise ConfigError(f"{directory}: {problem}; prepare it, for example with `{command}`")
    return read_record(directory / MANIFEST, Manifest, f"delete {directory} and run `hydra-dist data prepare` again")


def check_vocabulary(dataset: Dataset, vocab_size: int, key: str = "model.vocab_size") -> None:
    """Refuse a model whose embedding table is smaller than the data's vocabulary.

    Raises:
        ConfigError: names the key, its value, and the smallest value that works.
    """
    if vocab_size < dataset.vocab_size:
        raise ConfigError(
            f"{key} {vocab_size} is smaller than the vocabulary of {dataset.directory} ({dataset.vocab_size} entries); "
            f"{dataset.vocab_size} or more works"
        )
