"""A run's weights as a folder in the names of Hugging Face's transformers, and such a folder as a new run.

A new run is a checkpoint of step 0 that has weights and no optimizer state, and the ``model:`` section that belongs to
it: training goes on from it as from any other checkpoint, sampling reads it. What a folder cannot hold of the other
side's model is named and refused, or left out where that is asked for.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from hydra_dist.config import ModelConfig
from hydra_dist.data import load_tokenizer
from hydra_dist.data.tokenizer import BEGIN, END, json_sha256
from hydra_dist.errors import ConfigError, nearest
from hydra_dist.model import Transformer, initialize
from hydra_dist.model.interop import (
    CONFIG,
    new_folder,
    parse_size,
    patterns,
    read_hugging_face,
    to_hugging_face,
    write_json,
    write_weights,
)
from hydra_dist.train import checkpoint
from hydra_dist.train.checkpoint.folder import checkpoint_name
from hydra_dist.train.checkpoint.state import WEIGHT

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENIZER = "tokenizer.json"


def export_run(
    run: Path,
    output: Path,
    *,
    step: int | None = None,
    max_shard_size: str = "5GB",
    dtype: str = "float32",
    skip_unmatched: bool = False,
) -> str:
    """Write a run's weights, configuration and tokenizer into the new folder ``output``; what was done, in words.

    Args:
        run: the folder of a run.
        step: of the checkpoint; None takes the newest.
        max_shard_size: such as ``5GB``.
        dtype: ``float32`` (what checkpoints hold) or ``bfloat16``, rounded to nearest.
        skip_unmatched: see ``to_hugging_face``.

    Raises ConfigError for what cannot be exported, RunError for a damaged checkpoint or a disk that refuses.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: {' or '.join(DTYPES)} works{nearest(dtype, DTYPES)}")
    shard_bytes = parse_size(max_shard_size)
    path = _checkpoint_of(run, step)
    manifest = checkpoint.read_manifest(path)
    exported = to_hugging_face(
        ModelConfig.model_validate(manifest.model), checkpoint.load_weights(path), skip_unmatched
    )
    config = {**exported.config, "dtype": dtype, **_special_tokens(run)}
    if isinstance(length := manifest.extra.get("data.sequence_length"), int):
        config["max_position_embeddings"] = length
    with new_folder(output) as folder:
        files = write_weights(folder, exported.tensors, shard_bytes, DTYPES[dtype])
        write_json(folder / CONFIG, config)
        if (run / TOKENIZER).is_file():
            shutil.copyfile(run / TOKENIZER, folder / TOKENIZER)
            tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END}
            write_json(folder / "tokenizer_config.json", tokens)
    said = f"{output}: {path} as {config['model_type']}, {_described(exported.tensors)} in {len(files)} file(s)"
    return said + _listed("left out", exported.left_out)


def import_run(folder: Path, output: Path, *, vocab_size: int | None = None, skip_unmatched: bool = False) -> str:
    """Make the new run ``output`` of a folder in transformers' names; what was done, in words.

    ``output`` gets a checkpoint of step 0, ``model.yaml`` with the ``model:`` section that a configuration needs to
    train from there (with run.directory ``output``), and the folder's tokenizer where the model has all its ids. Data
    to train on is prepared with that one: ``hydra-dist data prepare --tokenizer OUTPUT/tokenizer.json``.

    Args:
        folder: ``config.json`` and safetensors.
        vocab_size: entries of the embedding (and of an untied head), at least as many as are there; added ones have
            starting values. None keeps the number.
        skip_unmatched: see ``from_hugging_face``. Weights that then have no counterpart there have starting values.

    Raises ConfigError for what cannot be imported, RunError for a damaged folder or a disk that refuses.
    """
    imported = read_hugging_face(folder, skip_unmatched)
    old_size = imported.config.vocab_size
    assert old_size is not None
    if vocab_size is not None and vocab_size < old_size:
        raise ConfigError(f"--vocab-size {vocab_size}: {folder} has {old_size} entries; {old_size} or more works")
    model = imported.config.model_copy(update={"vocab_size": vocab_size or old_size})
    weights, fresh = _completed(model, imported.weights)
    tokenizer = _usable_tokenizer(folder, model)
    metadata = {
        "data_step": 0,
        "context_size": 1,
        "precision": "fp32",
        "model": model.model_dump(mode="json"),
        "tokenizer_sha256": json_sha256(tokenizer) if tokenizer else None,
        "extra": {"imported": {"from": str(folder), "left_out": imported.left_out, "starting_values": fresh}},
    }
    with new_folder(output) as new:
        checkpoint.save(new / "checkpoints", 0, _Weights(weights), metadata=metadata)
        section = yaml.safe_dump({"model": model.model_dump(mode="json")}, sort_keys=False)
        (new / "model.yaml").write_text(section, encoding="utf-8")
        if tokenizer:
            (new / TOKENIZER).write_text(tokenizer, encoding="utf-8")
    said = f"{output}: {folder}, {_described(weights)}; train with the model section of {output / 'model.yaml'}"
    said += _listed("left out", imported.left_out) + _listed("with starting values", fresh)
    if not tokenizer:
        said += (
            f"\nno tokenizer, which sampling and training need: {folder / TOKENIZER} is missing, or has with {BEGIN} "
        )
        said += f"and {END} more than {model.vocab_size} entries"
    return said


def _checkpoint_of(run: Path, step: int | None) -> Path:
    root = run / "checkpoints"
    names = checkpoint.complete_checkpoints(root)
    if step is None:
        newest = checkpoint.latest(root) if root.is_dir() else None
        if newest is None:
            raise ConfigError(f"{run}: no checkpoint under {root}; the folder of a run, such as runs/quickstart, works")
        return newest
    if checkpoint_name(step) not in names:
        steps = ", ".join(str(int(name.removeprefix("step-"))) for name in names)
        raise ConfigError(f"--checkpoint {step}: {root} has {f'those of steps {steps}' if names else 'none'}")
    return root / checkpoint_name(step)


def _special_tokens(run: Path) -> dict[str, Any]:
    if not (run / TOKENIZER).is_file():
        return {"bos_token_id": None, "eos_token_id": None}
    tokenizer = load_tokenizer(run / TOKENIZER)
    return {"bos_token_id": tokenizer.begin_id, "eos_token_id": tokenizer.end_id}


def _usable_tokenizer(folder: Path, model: ModelConfig) -> str | None:
    """The folder's tokenizer as corpora keep it, with our special tokens; None where the model has not all its ids."""
    if not (folder / TOKENIZER).is_file():
        return None
    assert model.vocab_size is not None
    tokenizer = load_tokenizer(folder / TOKENIZER)
    return tokenizer.to_json() if tokenizer.vocab_size <= model.vocab_size else None


def _completed(model: ModelConfig, imported: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """fp32 weights of the whole model in its order, and which of them are starting values (all or some of them)."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Transformer(model).named_parameters()}
    lacking = [name for name in shapes if name not in imported or imported[name].shape != shapes[name]]
    started: dict[str, Tensor] = {}
    if lacking:
        transformer = Transformer(model)
        initialize(transformer, seed=0)
        started = {name: parameter.detach() for name, parameter in transformer.named_parameters() if name in lacking}
    weights = {}
    for name in shapes:
        weights[name] = started[name] if name in started else imported[name].to(torch.float32)
        if name in started and name in imported:  # a vocabulary that has grown
            weights[name][: len(imported[name])] = imported[name]
    grown = [f"{name} (rows from {len(imported[name])} on)" for name in lacking if name in imported]
    return weights, grown + patterns(name for name in lacking if name not in imported)


def _described(tensors: Mapping[str, Tensor]) -> str:
    return f"{len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors.values()):,} parameters"


def _listed(title: str, names: list[str]) -> str:
    return f"\n{title}: {', '.join(names)}" if names else ""


@dataclass
class _Weights:
    """Weights in an engine's place: what a checkpoint is written from."""

    tensors: dict[str, Tensor]
    stage: int = 0
    step: int = 0
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def keys(self, name: str) -> tuple[str, ...]:
        return (WEIGHT,)

    def dtype(self, name: str, key: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read_tensor(self, name: str, key: str, wanted: bool = True) -> Tensor | None:
        return self.tensors[name] if wanted else None

    def write_tensor(self, name: str, key: str, value: Tensor) -> None:
        self.tensors[name] = value

    def prepare_for_loading(self) -> None:
        """Nothing to do: there is no optimizer."""
