"""The fingerprint of a corpus: what its prepared bytes depend on.

The content of every file is read and hashed. That costs little beside tokenizing, and unlike sizes and times it
survives a copy or a fresh checkout of the same files, and notices an edit that keeps the size.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from hydra_dist.data.files import sha256_of
from hydra_dist.data.manifest import Fingerprint
from hydra_dist.data.sources import Inputs
from hydra_dist.data.tokenizer import parse_spec
from hydra_dist.errors import RunError


def take_fingerprint(
    inputs: Inputs,
    tokenizer_spec: str,
    progress: Callable[[int, int], None],
    *,
    field: str,
    eval_fraction: str,
    seed: int,
    shard_tokens: int,
    shuffle_bytes: int,
) -> Fingerprint:
    """Hash the input files and put them together with the settings.

    Args:
        progress: called with the bytes hashed and in total.

    Raises:
        RunError: a file that cannot be read.
    """
    total = sum(file.size for file in inputs.files)
    digest, done = hashlib.sha256(), 0
    for file in inputs.files:
        digest.update(f"{file.kind}\0".encode() + os.fsencode(file.name) + b"\0" + bytes.fromhex(_sha256(file.path)))
        done += file.size
        progress(done, total)
    return Fingerprint(
        inputs=[name.encode("utf-8", "backslashreplace").decode() for name in inputs.names],
        content=digest.hexdigest(),
        input_files=len(inputs.files),
        input_bytes=total,
        tokenizer=_tokenizer_identity(tokenizer_spec),
        field=field,
        eval_fraction=eval_fraction,
        seed=seed,
        shard_tokens=shard_tokens,
        shuffle_bytes=shuffle_bytes,
    )


def _tokenizer_identity(spec: str) -> str:
    wanted = parse_spec(spec)
    return spec if wanted.kind != "file" else f"file {wanted.path.name} {_sha256(wanted.path)}"


def _sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); make it readable or leave it out") from error
