"""Finding the files that a corpus is made of.

An input is a text file, a directory (walked in sorted order), a JSONL or Parquet file, or the word ``stdlib`` for the
built-in corpus. In a directory, a file is text by its extension or, failing that, by its content; hidden entries,
``__pycache__`` and files that are not text are left out.
"""

import codecs
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydra_dist.data.corpus import STDLIB, stdlib_files
from hydra_dist.data.documents import Kind, SourceFile
from hydra_dist.errors import ConfigError, RunError, nearest

_EXTENSIONS = """
    asm awk bash bat c cc cfg clj cmake cpp cs css csv cu cuh cxx dart diff ex exs f f90 go gradle graphql groovy h hh
    hpp hs htm html hxx ini java jl js json jsx kt latex less lisp lua m markdown md mk ml mli nim org patch php pl pm
    proto ps1 pyx r rb rs rst s scala scm scss sed sh sql svelte swift tcl tex text toml ts tsv tsx txt v vhd vim vue
    xml yaml yml zig zsh
"""
TEXT_EXTENSIONS = frozenset(f".{extension}" for extension in _EXTENSIONS.split())
KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".py": "python",
    ".pyi": "python",
    ".pyw": "python",
}
_SNIFFED_BYTES = 8192


@dataclass(frozen=True)
class Inputs:
    """The files found, in the order in which they are read, and the number of files left out as not text."""

    files: list[SourceFile]
    left_out: int = 0
    names: list[str] = field(default_factory=list)


def find_inputs(inputs: Sequence[str | Path], output: Path | None = None) -> Inputs:
    """The files of all inputs; a file that two inputs reach is read once.

    Args:
        inputs: paths, or ``stdlib`` for the built-in corpus (a path of that name is written ``./stdlib``).
        output: where the prepared data goes; it must not lie within an input, or a second run would read it.

    Raises:
        ConfigError: no input, a path that does not exist, an input without any text file.
        RunError: a file or directory that cannot be read.
    """
    if not inputs:
        raise ConfigError("no --input was given; name files or directories, or stdlib for the built-in corpus")
    files: dict[Path, SourceFile] = {}
    left_out = 0
    for entry in inputs:
        found, skipped = _find(entry, output)
        left_out += skipped
        if not found:
            raise ConfigError(f"--input {entry}: no text, JSONL or Parquet file in it; name another path, or stdlib")
        for file in found:
            files.setdefault(file.path.resolve(), file)
    return Inputs(list(files.values()), left_out, [_input_name(entry) for entry in inputs])


def _input_name(entry: str | Path) -> str:
    return STDLIB if entry == STDLIB else Path(entry).resolve().name


def _find(entry: str | Path, output: Path | None) -> tuple[list[SourceFile], int]:
    if entry == STDLIB:
        return stdlib_files(), 0
    path = Path(entry)
    if path.is_dir():
        if output is not None and output.resolve().is_relative_to(path.resolve()):
            raise ConfigError(f"--output {output} lies within --input {path}; choose an output outside of it")
        return _walk(path)
    if not path.exists():
        known = [STDLIB] if not path.parent.is_dir() else [STDLIB, *_names(path.parent)]
        raise ConfigError(
            f"--input {path}: no such file or directory{nearest(path.name, known)}; stdlib is the built-in corpus"
        )
    if not path.is_file():
        raise ConfigError(f"--input {path}: neither a file nor a directory; pipes and devices cannot be read twice")
    kind = KINDS.get(path.suffix.lower(), "text")
    if kind in ("text", "python") and b"\0" in _head(path):
        raise ConfigError(f"--input {path}: not a text file (it holds NUL bytes); text, JSONL and Parquet are read")
    return [SourceFile(path, path.resolve().name, kind, path.stat().st_size)], 0


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _walk(root: Path) -> tuple[list[SourceFile], int]:
    base = root.resolve().name
    files, left_out = [], 0
    for path in _paths(root):
        kind = _kind(path)
        if kind is None:
            left_out += 1
            continue
        name = "/".join((base, *path.relative_to(root).parts))
        files.append(SourceFile(path, name, kind, path.stat().st_size))
    return sorted(files, key=lambda file: os.fsencode(file.name)), left_out


def _paths(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise RunError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable or leave it out")

    for directory, names, files in os.walk(root, onerror=refuse):
        names[:] = [name for name in names if not name.startswith(".") and name != "__pycache__"]
        for name in files:
            path = Path(directory, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _kind(path: Path) -> Kind | None:
    """What a file in a directory is read as; None for one that is not text."""
    suffix = path.suffix.lower()
    if suffix in KINDS:
        return KINDS[suffix]
    if suffix in TEXT_EXTENSIONS:
        return "text"
    head = _head(path)
    if b"\0" in head:
        return None
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # a character cut at the end is not an error
    except UnicodeDecodeError:
        return None
    return "text"


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_SNIFFED_BYTES)
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); make it readable or leave it out") from error
