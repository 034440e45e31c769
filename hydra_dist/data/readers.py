"""Reading documents out of files, one at a time, in a fixed order.

Text is UTF-8 (Python sources declare their encoding, PEP 263; a byte order mark is no part of the text): what cannot be
decoded stops the reading with its place in the file, or is counted and listed where the user asked to skip it. The
built-in corpus contains files that are undecodable on purpose (tests of the tokenizer); those are always skipped.
"""

import io
import json
import tokenize
from collections.abc import Iterable, Iterator
from typing import Any

from hydra_dist.data.documents import Document, SourceFile
from hydra_dist.errors import RunError, nearest

_HINT = "repair or remove it, or pass --skip-undecodable to leave it out and have it listed"
_PARQUET_ROWS = 1024


class Skips:
    """What reading left out: undecodable files and lines with their reason, and the number of empty texts."""

    def __init__(self, allowed: bool):
        self.allowed = allowed
        self.undecodable: list[str] = []
        self.empty = 0

    def undecodable_at(self, file: SourceFile, place: str, reason: str) -> None:
        """Record a place of a file that cannot be decoded, or raise ``RunError`` where skipping was not asked for.

        The record has the document's name, so that it reads the same on every machine; the error has the path.
        """
        if not (self.allowed or file.kind == "stdlib"):
            raise RunError(f"{file.path}: {place}{reason}; {_HINT}")
        self.undecodable.append(f"{file.name}: {place}{reason}".encode("utf-8", "backslashreplace").decode())


def read_documents(files: Iterable[SourceFile], field: str, skips: Skips) -> Iterator[Document]:
    """The documents of all files, in order; empty texts are counted in ``skips`` and left out.

    Args:
        field: the key (JSONL) or column (Parquet) that holds the text.

    Raises:
        RunError: a file that cannot be read or decoded, a line without the field; the message names the place.
    """
    for file in files:
        try:
            for name, text in _texts(file, field, skips):
                if text:
                    yield Document(name, text, len(text.encode()))
                else:
                    skips.empty += 1
        except OSError as error:
            raise RunError(f"{file.path}: cannot be read ({error.strerror or error})") from error


def _texts(file: SourceFile, field: str, skips: Skips) -> Iterator[tuple[str, str]]:
    """(name, text) of each document of one file."""
    if file.kind == "jsonl":
        return _read_jsonl(file, field, skips)
    if file.kind == "parquet":
        return _read_parquet(file, field, skips)
    return _read_whole(file, skips)


def _read_whole(file: SourceFile, skips: Skips) -> Iterator[tuple[str, str]]:
    """A file as one document, line ends as they are in the file; a Python source in the encoding it declares."""
    data = file.path.read_bytes()
    encoding = "utf-8-sig"
    try:
        if file.kind != "text":
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
        text.encode()  # utf-7 and its like can carry lone surrogates
    except UnicodeError as error:
        at = (
            f"at byte {_byte_of(error, data)} ({error.reason})" if isinstance(error, UnicodeDecodeError) else str(error)
        )
        name = encoding.removesuffix("-sig").upper()
        skips.undecodable_at(file, "", f"not {name} {at}")
        return
    except (SyntaxError, LookupError) as error:  # LookupError: a codec that is no text encoding, such as hex
        skips.undecodable_at(file, "", str(error))
        return
    yield file.name, text


def _byte_of(error: UnicodeDecodeError, data: bytes) -> int:
    """Where decoding stopped; the codec does not count the byte order mark that it took off."""
    return len(data) - len(error.object) + error.start


def _read_jsonl(file: SourceFile, field: str, skips: Skips) -> Iterator[tuple[str, str]]:
    offset = 0
    with file.path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            start, offset = offset, offset + len(line)
            place = f"line {number}: "
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8"))
                text = _field_of(row, field, f"{file.path}: line {number}")
                text.encode()
            except UnicodeDecodeError as error:
                at = start + _byte_of(error, line.rstrip(b"\r\n"))
                skips.undecodable_at(file, place, f"not UTF-8 at byte {at} of the file ({error.reason})")
                continue
            except UnicodeEncodeError:
                skips.undecodable_at(file, place, f"field {field!r} holds half a surrogate pair, which is no character")
                continue
            except (ValueError, RecursionError) as error:  # ValueError also for a number of too many digits
                reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                skips.undecodable_at(file, place, f"not JSON ({reason})")
                continue
            yield f"{file.name}:{number}", text


def _field_of(row: Any, field: str, place: str) -> str:
    if not isinstance(row, dict):
        raise RunError(f"{place}: a JSON object with the field {field!r} is expected, not {_type_name(row)}")
    if field not in row:
        existing = ", ".join(map(repr, row)) or "none"
        raise RunError(
            f"{place}: no field {field!r}{nearest(field, row)}; its fields are {existing}; choose with --field"
        )
    value = row[field]
    if not isinstance(value, str):
        raise RunError(f"{place}: field {field!r} is {_type_name(value)}, not a text; choose another with --field")
    return value


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null", str: "a text"}
    return names.get(type(value), "a number")


def _read_parquet(file: SourceFile, field: str, skips: Skips) -> Iterator[tuple[str, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file.path)
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise RunError(f"{file.path}: not a Parquet file, or a truncated one ({error})") from error
    with table:
        _check_column(table.schema_arrow, field, file)
        row = 0
        try:
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
                for value in batch.column(0):
                    name = f"{file.name}:{row}"
                    try:
                        yield name, value.as_py() or ""  # null: no text
                    except UnicodeDecodeError as error:
                        reason = f"not UTF-8 at byte {error.start} of the text ({error.reason})"
                        skips.undecodable_at(file, f"row {row}: ", reason)
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise RunError(f"{file.path}: damaged at or behind row {row} ({str(error).strip()})") from error


def _check_column(schema: Any, field: str, file: SourceFile) -> None:
    import pyarrow.types as types

    if field not in schema.names:
        existing = ", ".join(map(repr, schema.names)) or "none"
        raise RunError(
            f"{file.path}: no column {field!r}{nearest(field, schema.names)}; its columns are {existing}; "
            f"choose with --field"
        )
    kind = schema.field(field).type
    plain = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain)):
        raise RunError(f"{file.path}: column {field!r} is {kind}, not text; choose another with --field")
