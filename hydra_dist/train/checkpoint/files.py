"""Files that are whole or not there: durable writes, safetensors shards written as a stream, checksums.

A shard's tensors come one at a time from collectives over all ranks, so the file is written as they come and hashed on
the way: no rank ever holds its shard in memory, and nothing is read back. The format is safetensors' own (an 8-byte
length, a JSON header, the tensors' bytes), which its library reads.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

BYTES_AT_ONCE = 2**26


class TensorInfo(NamedTuple):
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of the tensor's elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ShardWriter:
    """A safetensors file that takes its tensors one by one, in the order that was announced.

    The announced order must go from wide to narrow dtypes, so that every tensor lies at a multiple of its element size.
    Raises OSError as the system reports it; what is on disk then is no whole file.
    """

    def __init__(self, path: Path, tensors: Sequence[TensorInfo]) -> None:
        sizes = [info.dtype.itemsize for info in tensors]
        if sizes != sorted(sizes, reverse=True):
            raise ValueError("tensors must be ordered from wide to narrow dtypes")
        self._expected = list(tensors)
        self._written = 0
        self._digest = hashlib.sha256()
        self.num_bytes = 0
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            self._write(_header(tensors))
        except BaseException:
            os.close(self._descriptor)
            raise

    def write(self, tensor: Tensor) -> None:
        """Append the next tensor (on the CPU)."""
        info = self._expected[self._written]
        if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
            raise ValueError(f"{info.name}: expected {info.shape} {info.dtype}, got {tensor.shape} {tensor.dtype}")
        self._write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        self._written += 1

    def finish(self) -> str:
        """Bring everything to the disk; the file's sha256."""
        if self._written != len(self._expected):
            raise ValueError(f"{len(self._expected) - self._written} announced tensors were not written")
        with _naming(self._path):
            os.fsync(self._descriptor)
        return self._digest.hexdigest()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        with _naming(self._path):
            for start in range(0, len(view), BYTES_AT_ONCE):
                part = view[start : start + BYTES_AT_ONCE]
                _write_all(self._descriptor, part)
                self._digest.update(part)
        self.num_bytes += len(view)


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file and bring it to the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        with _naming(path):
            _write_all(descriptor, memoryview(data))
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(path: Path, data: bytes) -> None:
    """Give a small file new contents: at every moment it has the old ones or the new ones."""
    aside = path.with_name(path.name + ".partial")
    write_durably(aside, data)
    os.replace(aside, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Bring a directory's names to the disk, where its file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and user-space file systems know no fsync of directories: the server orders renames.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Checksum of a file in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_if_there(path: Path) -> None:
    """Remove a file that may be missing."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _header(tensors: Sequence[TensorInfo]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for info in tensors:
        if info.name in entries:
            raise ValueError(f"{info.name} is announced twice")
        stop = offset + info.num_bytes
        entries[info.name] = {
            "dtype": SAFETENSORS_DTYPES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of every element size
    return len(text).to_bytes(8, "little") + text


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give errors of calls that know only a descriptor the name of the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _write_all(descriptor: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(descriptor, data) :]
