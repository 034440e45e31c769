"""The manifest of a checkpoint: what it holds, of which model, and the checksums by which damage is found.

``manifest.json`` is the last file that is written into a checkpoint and the first that is read. It carries a checksum
of itself beside those of the shards, so that a changed digit is found too.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from hydra_dist.config import ModelConfig
from hydra_dist.errors import ConfigError, RunError
from hydra_dist.train.checkpoint.folder import instead_of

MANIFEST = "manifest.json"
FORMAT_VERSION = 1

FileName = Annotated[str, Field(pattern=r"^(weights|optimizer)-\d{5}-of-\d{5}\.safetensors$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0)]

NOT_THE_MODEL = ("compression_factor", "query_compression", "key_compression", "init_std")
"""Settings that are used up before training starts: other values give the same model (head counts are compared)."""


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class FileRecord(_Record):
    """One shard."""

    bytes: Size
    sha256: Digest


class TensorRecord(_Record):
    """Where one tensor of a parameter lies."""

    file: FileName
    shape: tuple[Size, ...]
    dtype: str
    """torch's name without the prefix: ``float32``."""


class Manifest(_Record):
    """All of ``manifest.json``."""

    version: Literal[1]
    step: Size
    """Updates done."""
    data_step: Size
    """Steps of data taken: ``step`` plus skipped ones; with the seed it is all that the sampler needs."""
    optimizer_step: Size
    """Steps that the optimizer counted, for its bias correction."""
    world_size: int
    zero_stage: int
    context_size: int
    precision: str
    model: dict[str, JsonValue]
    """``ModelConfig``, with the vocabulary size filled in."""
    tokenizer_sha256: str | None = None
    versions: dict[str, str]
    extra: dict[str, JsonValue] = {}
    """What parts of the run keep besides tensors."""
    parameters: dict[str, dict[str, TensorRecord]]
    """For each parameter ``weight`` and the optimizer's states by name."""
    files: dict[FileName, FileRecord]
    checksum: Digest
    """sha256 of all the rest."""

    @property
    def num_bytes(self) -> int:
        """Of all shards."""
        return sum(record.bytes for record in self.files.values())


def encode_manifest(content: dict[str, Any]) -> bytes:
    """The file's bytes for everything but ``version`` and ``checksum``. ValueError for what JSON cannot hold."""
    content = {"version": FORMAT_VERSION, **content}
    text = json.dumps({**content, "checksum": _checksum(content)}, indent=1, allow_nan=False)
    Manifest.model_validate_json(text)
    return (text + "\n").encode()


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of the checkpoint folder ``path``, checked against its schema, its checksum and the files' sizes.

    Raises RunError with the file and what to do: missing, no JSON, another version, keys missing or unknown, a shard
    missing or of another size, a file name that leaves the folder.
    """
    path = Path(path)
    file = path / MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise damaged(path, file, "is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(path, file, f"cannot be read ({error})") from None
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, file, f"is no JSON ({error})") from None
    if isinstance(raw, dict) and raw.get("version", FORMAT_VERSION) != FORMAT_VERSION:
        raise RunError(
            f"{file}: format version {raw['version']!r}, and this hydra_dist reads version {FORMAT_VERSION}; "
            "use the hydra_dist that wrote it"
        )
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the whole file"
        raise damaged(path, file, f"is not a manifest ({where}: {problem['msg']})") from None
    if _checksum({key: value for key, value in raw.items() if key != "checksum"}) != manifest.checksum:
        raise damaged(path, file, "was changed after it was written (its checksum differs)")
    _check_files(path, manifest)
    return manifest


def check_same_model(manifest: Manifest, model: ModelConfig | Mapping[str, Any], path: str | Path) -> None:
    """ConfigError that names the first setting in which a checkpoint's model differs from ``model``."""
    here = model.model_dump(mode="json") if isinstance(model, ModelConfig) else model
    fields = ModelConfig.model_fields
    for key in (*fields, *sorted(set(here) | set(manifest.model))):
        # A setting that came after the checkpoint was written has its default there.
        default = fields[key].get_default() if key in fields and not fields[key].is_required() else None
        there, now = (_plain(values.get(key, default)) for values in (manifest.model, here))
        if there != now and key not in NOT_THE_MODEL:
            raise ConfigError(
                f"{path} is a checkpoint of another model: model.{key} is {json.dumps(there)} there and "
                f"{json.dumps(now)} here; model.{key}={json.dumps(there)}, or another run.directory, works"
            )


def damaged(path: Path, file: Path, reason: str) -> RunError:
    """The error for a checkpoint that cannot be used because of one file."""
    return RunError(f"{file} {reason}; {instead_of(path)}")


def _check_files(path: Path, manifest: Manifest) -> None:
    for name, record in manifest.files.items():
        file = path / name
        try:
            size = file.stat().st_size
        except OSError as error:
            raise damaged(path, file, f"cannot be read ({error.strerror})") from None
        if size != record.bytes:
            raise damaged(path, file, f"has {size} bytes instead of {record.bytes}")
    for name, tensors in manifest.parameters.items():
        if "weight" not in tensors:
            raise damaged(path, path / MANIFEST, f"has no weight for {name}")
        for key, tensor in tensors.items():
            if tensor.file not in manifest.files:
                raise damaged(path, path / MANIFEST, f"puts {key} of {name} into {tensor.file}, which it does not list")


def _checksum(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """As JSON would give it back: tuples as lists."""
    return json.loads(json.dumps(value))
