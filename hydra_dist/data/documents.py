"""What a document is, which documents are held out for evaluation, and in which order documents are written.

Both decisions are functions of a document's name alone (and the seed), so they do not depend on the order in which
files are found, on the machine, or on what else is in the corpus. Whole documents are held out: no training row
shares a file with an evaluation row.
"""

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

from hydra_dist.errors import ConfigError

Kind = Literal["text", "python", "stdlib", "jsonl", "parquet"]
"""How a file is read; ``python`` and ``stdlib`` (the built-in corpus) in the encoding that the source declares."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that holds documents.

    ``name`` is the file's path relative to the input it was found under, with the input's own name in front, and
    slashes on every system; ``path`` is where it lies on this machine.
    """

    path: Path
    name: str
    kind: Kind
    size: int


@dataclass(frozen=True, slots=True)
class Document:
    """One text, with its name and its length in UTF-8 bytes."""

    name: str
    text: str
    text_bytes: int


def name_digest(name: str) -> int:
    """sha256 of a document's name as an integer; names that are not valid Unicode hash by their raw bytes."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest(), "big")


def shuffle_key(name: str, seed: int) -> bytes:
    """The sort key of the fixed shuffle: unrelated to the order of names, and another one for each seed."""
    return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest()


def eval_share(eval_fraction: float) -> Fraction:
    """The held-out share as a fraction p/q with q <= 10000, so that the rule below is exact integer arithmetic.

    Raises:
        ConfigError: not within [0, 1).
    """
    if not 0 <= eval_fraction < 1:
        raise ConfigError(
            f"--eval-fraction {eval_fraction} is not a share of the documents; "
            f"0 (hold nothing out) up to, but not including, 1 is allowed, 0.03125 is the default"
        )
    share = Fraction(eval_fraction).limit_denominator(10000)
    if share == 1 or (share == 0 and eval_fraction > 0):
        raise ConfigError(
            f"--eval-fraction {eval_fraction} is finer than one document in 10000; 0, 0.0001 and 0.03125 work"
        )
    return share


def is_held_out(name: str, share: Fraction) -> bool:
    """Whether a document belongs to the evaluation split: sha256(name) mod q < p for a share of p/q.

    For the default of 1/32 that is sha256(name) mod 32 == 0.
    """
    return name_digest(name) % share.denominator < share.numerator
