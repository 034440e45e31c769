"""Folders as transformers reads and writes them: ``config.json``, safetensors files, and an index where there are many.

    DIR/config.json
    DIR/model.safetensors                    or, above the size of a shard,
    DIR/model-00001-of-00003.safetensors ... and DIR/model.safetensors.index.json, which says what lies where

Tensors are read when they are asked for. A folder is written under another name, brought to the disk and renamed: it is
whole or not there. Pickled weights (``pytorch_model.bin``) are not read.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hydra_dist.errors import ConfigError, RunError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class StoredTensors(Mapping[str, Tensor]):
    """Tensors by name, each read from its file when it is taken (mapped: what is not used is not read)."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)

    def __getitem__(self, name: str) -> Tensor:
        path = self._files[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{path}: {name} cannot be read ({error}); fetch the file again") from None
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_folder(path: Path) -> tuple[dict[str, Any], StoredTensors]:
    """A folder's ``config.json``, and its tensors.

    Raises ConfigError where the folder is none of the kind, RunError where one of its files is missing or damaged.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder; one with {CONFIG} and {WEIGHTS} works")
    config = _read_json(path / CONFIG)
    if (path / INDEX).is_file():
        return config, StoredTensors(_indexed(path))
    if (path / WEIGHTS).is_file():
        return config, StoredTensors(dict.fromkeys(_names(path / WEIGHTS), path / WEIGHTS))
    pickled = " (pickled weights are not read: save them as safetensors first)" if list(path.glob("*.bin")) else ""
    raise ConfigError(f"{path} has neither {WEIGHTS} nor {INDEX}{pickled}")


def _indexed(path: Path) -> dict[str, Path]:
    index = _read_json(path / INDEX)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise RunError(f'{path / INDEX} has no "weight_map" of tensors and files; fetch it again')
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise RunError(f"{path / INDEX} names {file!r}, which is no file of this folder")
        listed = {name for name, place in places.items() if place == file}
        if lacking := sorted(listed - set(_names(path / file))):
            raise RunError(f"{path / file} lacks {lacking[0]}, which {INDEX} puts there; fetch both again")
    return {name: path / file for name, file in places.items()}


def _names(path: Path) -> list[str]:
    """What a safetensors file holds; the library compares the file's length with its header."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except FileNotFoundError:
        raise RunError(f"{path} is missing; fetch it") from None
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} is damaged or cut short ({error}); fetch it again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; the folder of a Hugging Face model has one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read ({error}); fetch it again") from None
    if not isinstance(values, dict):
        raise RunError(f"{path} holds no keys and values; fetch it again")
    return values


def parse_size(text: str) -> int:
    """Bytes of ``500MB``, ``5GB`` or ``1000000``; decimal units, as in transformers. ConfigError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise ConfigError(f"--max-shard-size {text}: a number of bytes such as 5GB or 500MB works")
    return size


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], max_shard_size: int, dtype: torch.dtype | None = None
) -> list[str]:
    """Write ``tensors`` into a folder that is there, in shards of at most ``max_shard_size`` bytes (a tensor that is
    larger has one for itself); names of the files. One shard at a time is copied into memory."""

    def size(tensor: Tensor) -> int:
        return tensor.numel() * (dtype or tensor.dtype).itemsize

    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + size(tensor) > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size(tensor)
    files = (
        [WEIGHTS]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    for file, names in zip(files, shards, strict=True):
        # A copy of its own for each: parts of one tensor share memory, which the format knows nothing of.
        part = {name: tensors[name].detach().to("cpu", dtype, copy=True).contiguous() for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        metadata = {
            "total_parameters": sum(tensor.numel() for tensor in tensors.values()),
            "total_size": sum(map(size, tensors.values())),
        }
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(places.items()))})
    return files


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A JSON file with keys in order."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which gets the name ``path`` when the block ends well and vanishes when it does not.

    Raises ConfigError where ``path`` exists and is not an empty folder, RunError where the disk refuses.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(f"{path} is there already; a name that is new, or an empty folder, works")
    aside = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        aside.mkdir(parents=True)
        yield aside
        for written in [*aside.rglob("*"), aside]:
            _sync(written)
        os.rename(aside, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} could not be written: {error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
