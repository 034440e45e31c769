"""The manifest of prepared data: what lies in the directory, and what it was made from.

``manifest.json`` is written last, so a directory with a manifest is complete. It holds no times and no paths of the
machine: the same corpus and settings give the same bytes.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from hydra_dist.errors import RunError

FORMAT = 1
"""Of the manifest, the journal and the shards; the records below name it again as a literal."""
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "eval")

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _plain(name: str) -> str:
    if not _PLAIN_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a plain file name: files of prepared data lie in its directory")
    return name


class Record(BaseModel):
    """Base of what is read back from disk: exact types, no key but the known ones."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class FileRecord(Record):
    """A file of the directory: its plain name, size in bytes and sha256."""

    name: Annotated[str, AfterValidator(_plain)]
    size: int = Field(ge=0)
    sha256: str


class ShardRecord(Record):
    """A shard: whole documents, each ``<|begin|>`` + tokens + ``<|end|>``.

    ``block`` is the shuffle buffer that it came from; ``token_bytes`` is there for tokenizers that are not byte-level.
    """

    block: int = Field(ge=0)
    tokens: int = Field(ge=2)
    documents: int = Field(ge=1)
    text_bytes: int = Field(ge=0)
    data: FileRecord
    index: FileRecord
    token_bytes: FileRecord | None = None

    @property
    def files(self) -> list[FileRecord]:
        return [file for file in (self.data, self.index, self.token_bytes) if file is not None]


class TokenizerRecord(Record):
    """The tokenizer file, and what the data needs to know of it."""

    file: FileRecord
    vocab_size: int = Field(ge=1)
    begin_id: int = Field(ge=0)
    end_id: int = Field(ge=0)
    byte_level: bool
    notes: list[str] = []


class Fingerprint(Record):
    """Everything that decides the bytes of prepared data.

    ``inputs`` are base names, ``content`` is one sha256 over the name, size and content of every file.
    ``eval_fraction`` is written as a fraction. Skipping of undecodable places is not in it: where nothing is
    undecodable it changes nothing, and where something is, the preparation stops without it.
    """

    inputs: list[str]
    content: str
    input_files: int
    input_bytes: int
    tokenizer: str
    field: str
    eval_fraction: str
    seed: int
    shard_tokens: int
    shuffle_bytes: int

    def differences(self, other: "Fingerprint") -> list[str]:
        """What differs, for a reader: ``tokenizer: byte here, train:8192 asked for``."""
        labels = {"content": "the content of the input files"}
        found = []
        for key in type(self).model_fields:
            here, there = getattr(self, key), getattr(other, key)
            if here != there:
                found.append(labels.get(key, f"{key}: {_brief(here)} here, {_brief(there)} asked for"))
        return found


class Manifest(Record):
    """The whole of ``manifest.json``."""

    format: Literal[1] = 1
    fingerprint: Fingerprint
    tokenizer: TokenizerRecord
    dtype: Literal["uint16", "uint32"]
    splits: dict[Literal["train", "eval"], list[ShardRecord]]
    skipped: list[str] = []
    empty_documents: int = 0
    files_left_out: int = 0

    def shards(self, split: str) -> list[ShardRecord]:
        return {str(name): shards for name, shards in self.splits.items()}[split]

    def total(self, split: str, what: Literal["tokens", "documents", "text_bytes"]) -> int:
        """Of one split: number of tokens (special ones included), documents, or bytes of text."""
        return sum(getattr(shard, what) for shard in self.shards(split))


RecordT = TypeVar("RecordT", bound=Record)


def record_bytes(record: Record) -> bytes:
    """A record as an indented JSON file."""
    return (json.dumps(record.model_dump(), indent=1) + "\n").encode()


def read_record(path: Path, kind: type[RecordT], remedy: str) -> RecordT:
    """Read a JSON file written by ``record_bytes``.

    Raises:
        RunError: unreadable, no JSON, of another format version, or with a value that cannot be; ends in ``remedy``.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise RunError(f"{path}: not readable as JSON ({error}); {remedy}") from error
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise RunError(f"{path}: format {version!r}, but this version reads format {FORMAT}; {remedy}")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise RunError(f"{path}: {_first_problem(error)}; {remedy}") from error


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _brief(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, Iterable) and not isinstance(value, str) else str(value)
