"""Reading a checkpoint: into an engine of any ZeRO stage and world size, or as plain weights."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hydra_dist.config import ModelConfig
from hydra_dist.errors import ConfigError, RunError
from hydra_dist.train.checkpoint.files import sha256_of
from hydra_dist.train.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    TensorRecord,
    check_same_model,
    damaged,
    read_manifest,
)
from hydra_dist.train.checkpoint.peers import Peers
from hydra_dist.train.checkpoint.state import WEIGHT, State, deal, stored_name


def load(
    path: str | Path,
    state: State,
    *,
    expected_model: ModelConfig | Mapping[str, Any] | None = None,
    expected_tokenizer: str | None = None,
    peers: Peers | None = None,
) -> Manifest:
    """Put a checkpoint's weights, optimizer state and optimizer step into an engine, at any stage and world size.

    Collective. Before anything is written into the engine, every checksum is verified (each rank reads its share of the
    files) and every name, shape and dtype compared, and all ranks agree. Each rank then reads its own part only.

    Args:
        path: the checkpoint's folder.
        expected_model: this run's model; None skips the comparison of settings, not that of shapes.
        expected_tokenizer: sha256 of this run's tokenizer; None skips.

    Raises, the same on every rank: ConfigError for a checkpoint of another model, tokenizer or optimizer; RunError for
    a damaged one, with the file and what to do.
    """
    path, peers = Path(path), peers or Peers()
    manifest = _agree(path, peers, expected_model, expected_tokenizer)
    state.prepare_for_loading()
    peers.together(lambda: _compare(path, manifest, state))
    peers.together(lambda: _read_into(path, manifest, state))
    state.step = manifest.optimizer_step
    return manifest


def _agree(
    path: Path, peers: Peers, expected_model: ModelConfig | Mapping[str, Any] | None, expected_tokenizer: str | None
) -> Manifest:
    """Everything that can be wrong with a checkpoint by itself, or with this run for it, found by any rank."""
    found: list[Manifest] = []

    def check() -> str:
        manifest = read_manifest(path)
        if expected_model is not None:
            check_same_model(manifest, expected_model, path)
        if None not in (expected_tokenizer, manifest.tokenizer_sha256) and (
            expected_tokenizer != manifest.tokenizer_sha256
        ):
            raise ConfigError(
                f"{path} was trained with another tokenizer (sha256 {manifest.tokenizer_sha256}, here "
                f"{expected_tokenizer}); the data.directory of that run, or another run.directory, works"
            )
        sizes = {name: record.bytes for name, record in manifest.files.items()}
        _verify_files(path, manifest, deal(sizes, peers.size)[peers.rank])
        found.append(manifest)
        return manifest.checksum

    if len(set(peers.together(check))) > 1:
        raise RunError(f"{path / MANIFEST} is not the same file on all ranks; put run.directory on shared storage")
    return found[0]


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The fp32 weights of a checkpoint by parameter name, on the CPU, verified; tied ones under their first name.

    The tensors are mapped from the files: they are read when they are first used, and writing to them changes no file.
    Raises RunError for a damaged checkpoint.
    """
    path = Path(path)
    manifest = read_manifest(path)
    _verify_files(path, manifest, sorted({tensors[WEIGHT].file for tensors in manifest.parameters.values()}))
    with _Shards(path) as shards:
        return {name: shards.read(name, WEIGHT, tensors[WEIGHT]) for name, tensors in manifest.parameters.items()}


def verify(path: str | Path) -> Manifest:
    """Read a whole checkpoint and compare every checksum; its manifest. Raises RunError for the first damaged file."""
    path = Path(path)
    manifest = read_manifest(path)
    _verify_files(path, manifest, sorted(manifest.files))
    with _Shards(path) as shards:
        for name, tensors in manifest.parameters.items():
            for key, record in tensors.items():
                shards.read(name, key, record)
    return manifest


def _verify_files(path: Path, manifest: Manifest, names: list[str]) -> None:
    for name in names:
        try:
            digest = sha256_of(path / name)
        except OSError as error:
            raise damaged(path, path / name, f"cannot be read ({error.strerror})") from None
        if digest != manifest.files[name].sha256:
            raise damaged(path, path / name, f"is damaged: its sha256 is {digest}, not {manifest.files[name].sha256}")


def _compare(path: Path, manifest: Manifest, state: State) -> None:
    """Every parameter, state, shape and dtype of the engine is in the checkpoint, and nothing else is."""
    there, here = manifest.parameters, set(state.names)
    for what, names in (("lacks", here - set(there)), ("has, and this model lacks,", set(there) - here)):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise ConfigError(f"{path} {what} {len(names)} parameters ({some}): it is of another model")
    never_stepped = manifest.optimizer_step == 0 and all(set(tensors) == {WEIGHT} for tensors in there.values())
    for name in state.names:
        keys = (WEIGHT,) if never_stepped else state.keys(name)
        if set(there[name]) != set(keys):
            raise ConfigError(
                f"{path} is of another optimizer: for {name} it keeps {', '.join(sorted(there[name]))} and this one "
                f"{', '.join(sorted(keys))}; the optimizer settings of that run work"
            )
        for key in keys:
            record = there[name][key]
            dtype = str(state.dtype(name, key)).removeprefix("torch.")
            if (record.shape, record.dtype) != (state.shape(name), dtype):
                raise ConfigError(
                    f"{path}: {key} of {name} is {record.dtype} {list(record.shape)} there and "
                    f"{dtype} {list(state.shape(name))} here: it is of another model or optimizer"
                )


def _read_into(path: Path, manifest: Manifest, state: State) -> None:
    with _Shards(path) as shards:
        for name, tensors in manifest.parameters.items():
            for key, record in tensors.items():
                state.write_tensor(name, key, shards.read(name, key, record))


class _Shards:
    """Open shards of one checkpoint; tensors are mapped, so that only what is used is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, name: str, key: str, record: TensorRecord) -> Tensor:
        try:
            if record.file not in self._open:
                file = safe_open(self._path / record.file, framework="pt")
                self._open[record.file] = self._stack.enter_context(file)
            tensor = self._open[record.file].get_tensor(stored_name(name, key))
        except (OSError, SafetensorError) as error:
            raise damaged(self._path, self._path / record.file, f"cannot be read ({error})") from None
        if (tuple(tensor.shape), str(tensor.dtype)) != (record.shape, f"torch.{record.dtype}"):
            raise damaged(self._path, self._path / record.file, f"holds another {key} of {name} than the manifest says")
        return tensor
