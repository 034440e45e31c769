"""Where a preparation stands, so that an interrupted one goes on with its finished shards.

``progress.json`` lies beside the shards until the manifest replaces it. It holds the fingerprint of input and settings,
the tokenizer, and every finished shard with its checksum; it is rewritten, atomically, after each of them.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from hydra_dist.data.files import TEMPORARY, output_errors, sha256_of, write_atomic
from hydra_dist.data.manifest import (
    MANIFEST,
    SPLITS,
    TOKENIZER,
    FileRecord,
    Fingerprint,
    Manifest,
    Record,
    ShardRecord,
    TokenizerRecord,
    read_record,
    record_bytes,
)
from hydra_dist.errors import ConfigError, RunError

PROGRESS = "progress.json"


class Progress(Record):
    """The content of ``progress.json``; shards in the order in which they were finished."""

    format: Literal[1] = 1
    fingerprint: Fingerprint
    tokenizer: TokenizerRecord | None = None
    shards: dict[Literal["train", "eval"], list[ShardRecord]]


class Journal:
    """The progress of one preparation, on disk after every change."""

    def __init__(self, directory: Path, fingerprint: Fingerprint):
        self.directory = directory
        self.fingerprint = fingerprint
        self.tokenizer: TokenizerRecord | None = None
        self.shards: dict[str, list[ShardRecord]] = {split: [] for split in SPLITS}
        self.lost: list[str] = []
        """Finished files that were found altered or missing, and are written again."""

    @classmethod
    def open(cls, directory: Path, fingerprint: Fingerprint) -> "Journal":
        """Go on where an earlier run stopped, or begin.

        Raises:
            ConfigError: the directory holds finished shards of another corpus, or files that are none of ours.
        """
        journal = cls(directory, fingerprint)
        path = directory / PROGRESS
        if not path.is_file():
            strangers = sorted(p.name for p in directory.iterdir() if not p.name.endswith(TEMPORARY))
            if strangers:
                raise ConfigError(
                    f"--output {directory}: not empty ({strangers[0]} is in it), and not prepared data; "
                    f"choose an empty or new directory"
                )
        else:
            found = read_record(path, Progress, f"delete {directory} or choose another --output")
            finished = any(found.shards.values())
            differences = found.fingerprint.differences(fingerprint)
            if differences and finished:
                raise ConfigError(
                    f"--output {directory}: holds the unfinished preparation of another corpus "
                    f"({'; '.join(differences)}); choose another --output, or delete the directory"
                )
            if not differences:
                journal._take_over(found)
        with output_errors(directory):
            for leftover in directory.glob(f"*{TEMPORARY}"):
                leftover.unlink()
            journal._save()
        return journal

    def finished(self, split: str, block: int) -> int:
        """Documents of a split's part of a block that lie in finished shards."""
        return sum(shard.documents for shard in self.shards[split] if shard.block == block)

    def set_tokenizer(self, record: TokenizerRecord) -> None:
        self.tokenizer = record
        self._save()

    def add(self, split: str, shard: ShardRecord) -> None:
        self.shards[split].append(shard)
        self._save()

    def complete(self, manifest: Manifest) -> None:
        """Write the manifest, which makes the directory complete, and end the journal."""
        write_atomic(self.directory / MANIFEST, record_bytes(manifest))
        (self.directory / PROGRESS).unlink()

    def abandon(self) -> None:
        """Remove what this preparation wrote: for input that turned out to hold nothing."""
        files = [file for shards in self.shards.values() for shard in shards for file in shard.files]
        for name in [*(file.name for file in files), TOKENIZER, PROGRESS]:
            (self.directory / name).unlink(missing_ok=True)

    def _take_over(self, found: Progress) -> None:
        """Keep what is intact on disk. A shard follows from the ones before it, so nothing behind a bad one is kept."""
        if found.tokenizer is None or not self._intact(found.tokenizer.file):
            return
        self.tokenizer = found.tokenizer
        for split, shards in found.shards.items():
            for shard in shards:
                if not all(self._intact(file) for file in shard.files):
                    break
                self.shards[split].append(shard)

    def _intact(self, file: FileRecord) -> bool:
        path = self.directory / file.name
        try:
            intact = path.stat().st_size == file.size and sha256_of(path) == file.sha256
        except OSError:
            intact = False
        if not intact:
            self.lost.append(file.name)
        return intact

    def _save(self) -> None:
        progress = Progress.model_validate(
            {"fingerprint": self.fingerprint, "tokenizer": self.tokenizer, "shards": self.shards}
        )
        write_atomic(self.directory / PROGRESS, record_bytes(progress))


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Create the directory where needed and keep a second preparation out of it, as long as this one runs.

    Raises:
        RunError: the directory cannot be made, or another process is preparing data in it.
    """
    with output_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"{directory}: another process is preparing data there; wait for it, or choose another --output"
            ) from error
        except OSError:
            pass  # file systems without locks: the guard is gone, not the atomic writes
        yield
    finally:
        os.close(handle)
