"""Files that are either complete or absent.

Everything is written under a temporary name, forced to disk and renamed, so that neither a killed process nor a full
disk leaves a half-written file under its final name.
"""

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from typing import Any

import numpy as np

from hydra_dist.errors import RunError

TEMPORARY = ".tmp"
_READ_BYTES = 1 << 20


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn what the system says about writing below ``path`` into one message for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in (ENOSPC, EDQUOT, EFBIG):
            raise RunError(
                f"{path}: no space left to write to ({error.strerror}); finished shards are kept: free some space and "
                f"run the same command again to go on, or choose another --output"
            ) from error
        raise RunError(f"{path}: cannot be written ({error.strerror or error}); choose another --output") from error


class AtomicFile:
    """A file that appears under its name, complete, at ``commit``; hashed while it is written."""

    def __init__(self, path: Path):
        self.path = path
        self.size = 0
        self._temporary = path.with_name(path.name + TEMPORARY)
        self._digest = hashlib.sha256()
        self._file = self._temporary.open("wb")

    @property
    def sha256(self) -> str:
        """Of what has been written so far."""
        return self._digest.hexdigest()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def commit(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)

    def discard(self) -> None:
        """Leave nothing behind; also after a failed write, whose buffer cannot be flushed."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file; it is complete or as it was before."""
    file = AtomicFile(path)
    try:
        file.write(data)
        file.commit()
    except BaseException:
        file.discard()
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Force the names in a directory to disk (a rename is not durable before)."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems refuse it; the data itself is already there
            os.fsync(handle)
    finally:
        os.close(handle)


def npy_bytes(array: np.ndarray[Any, Any]) -> bytes:
    """An array as the content of an ``.npy`` file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def sha256_of(path: Path) -> str:
    """sha256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
