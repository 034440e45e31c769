"""Whole models between our names and those of transformers, and what has no counterpart on the other side."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from hydra_dist.config import ModelConfig
from hydra_dist.errors import ConfigError, RunError, nearest
from hydra_dist.model.interop import llama, zaya
from hydra_dist.model.interop.files import CONFIG, read_folder
from hydra_dist.model.interop.rules import Rule, to_ours, to_theirs
from hydra_dist.model.interop.settings import Settings
from hydra_dist.model.interop.zaya_first_release import todays_names

FAMILIES: dict[str, ModuleType] = {"llama": llama, "zaya": zaya}
"""``model_type`` in ``config.json`` -> names and settings."""
ATTENTION = {"ccgqa": "zaya", "gqa": "llama"}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Exported:
    """A model as transformers has it."""

    config: dict[str, Any]
    """Of ``config.json``."""
    tensors: dict[str, Tensor]
    left_out: list[str]
    """Our weights that have no counterpart, by pattern with their number."""


@dataclass(frozen=True)
class Imported:
    """A model of transformers as we have it."""

    config: ModelConfig
    weights: dict[str, Tensor]
    """By our names, in the dtype in which they came."""
    left_out: list[str]
    """Their tensors that have no counterpart, by pattern with their number."""


def to_hugging_face(config: ModelConfig, weights: Mapping[str, Tensor], skip_unmatched: bool = False) -> Exported:
    """Our weights in transformers' names and layouts: ``llama`` for layers that are all gqa, ``zaya`` for ccgqa.

    What is exact: every number is the same bit for bit, but for temperatures that are not ``raw``: there the factor on
    the keys is written, exp(tau) rounded once.

    Args:
        config: with ``vocab_size`` set.
        weights: by parameter name; a tied head is not among them, or is the embedding.
        skip_unmatched: leave out weights that have no counterpart (a ccgqa model's dense MLPs, norms between attention
            and projection). What is written is then not the same function.

    Raises:
        ConfigError: weights without a counterpart, or settings that the other model does not have.
        RunError: weights that are missing or of another shape than ``config`` says.
    """
    kinds = sorted({layer.attention for layer in config.layers})
    if len(kinds) > 1:
        raise ConfigError(
            f"model.attention is {' and '.join(kinds)} in different layers; one kind for all layers works"
        )
    model_type = ATTENTION[kinds[0]]
    family = FAMILIES[model_type]
    written = {
        "architectures": [family.ARCHITECTURE],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        **family.written_config(config),
    }
    rules: list[Rule] = family.rules(config)
    tied = {"head.weight"} if config.tie_embeddings else set()
    unmatched = patterns(set(weights) - {rule.ours.name for rule in rules} - tied)
    if unmatched and not skip_unmatched:
        raise ConfigError(
            f"{model_type} of transformers has no counterpart for {', '.join(unmatched)}; "
            "--skip-unmatched writes everything else, which is then another function"
        )
    return Exported(written, to_theirs(rules, weights), unmatched)


def from_hugging_face(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], skip_unmatched: bool = False, source: str = CONFIG
) -> Imported:
    """A model of transformers in our names and layouts, bit for bit.

    Args:
        config: of ``config.json``; ``source`` is what errors call it.
        tensors: by name, of today or of ZAYA's first release.
        skip_unmatched: leave out tensors that have no counterpart (ZAYA's experts, routers and residual scales); what
            of ours has none (MLPs beside CCGQA layers) is then not among the weights.

    Raises:
        ConfigError: an unknown model_type, settings that are not built here, or tensors without a counterpart.
        RunError: tensors that are missing or of another shape than ``config`` says.
    """
    settings = Settings(source, config)
    model_type = settings.get("model_type")
    if model_type not in FAMILIES:
        known = " and ".join(FAMILIES)
        hint = nearest(model_type, FAMILIES) if isinstance(model_type, str) else ""
        raise settings.refused("model_type", f"{known} can be read{hint}")
    if settings.get("quantization_config") is not None:
        raise settings.refused("quantization_config", "quantized weights are not read; the unquantized model works")
    family = FAMILIES[model_type]
    model = _model_config(settings, family.model_settings(settings))
    by_name = _Renamed(tensors, todays_names(tensors) if model_type == "zaya" else {name: name for name in tensors})
    rules: list[Rule] = family.rules(model)
    expected = {named.name for rule in rules for named in rule.theirs}
    if model.tie_embeddings and HEAD in by_name:
        _check_tied(by_name, source)
        expected.add(HEAD)
    unmatched = patterns(set(by_name) - expected)
    alone = [f"here, of {', '.join(unmatched)}"] if unmatched else []
    alone += [f"there, of {family.OURS_ALONE}"] if family.OURS_ALONE else []
    if alone and not skip_unmatched:
        raise ConfigError(
            f"{source}: there is no counterpart {', and '.join(alone)}; "
            "--skip-unmatched takes everything else, which is then another function"
        )
    return Imported(model, to_ours(rules, by_name), unmatched)


def read_hugging_face(folder: str | Path, skip_unmatched: bool = False) -> Imported:
    """``from_hugging_face`` for a folder on this machine; raises what ``read_folder`` does as well."""
    config, tensors = read_folder(Path(folder))
    try:
        return from_hugging_face(config, tensors, skip_unmatched, str(Path(folder) / CONFIG))
    except RunError as error:
        raise RunError(f"{folder}: {error}") from None


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Copy weights by our names (``Imported.weights``) into ``model``; names of its parameters that stay as they are.

    Raises RunError, before anything is copied, for a weight that the model has not or has in another shape.
    """
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        if name not in parameters:
            raise RunError(f"{name} is no parameter of this model{nearest(name, parameters)}")
        if parameters[name].shape != weight.shape:
            raise RunError(f"{name} is {list(weight.shape)}, and this model's is {list(parameters[name].shape)}")
    for name, weight in weights.items():
        parameters[name].copy_(weight)
    return [name for name in parameters if name not in weights]


def patterns(names: Iterable[str]) -> list[str]:
    """Names with their numbers replaced by ``*``, with how many each stands for: ``layers.*.norm.weight (2)``."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    return [f"{pattern} ({count})" for pattern, count in sorted(counts.items())]


class _Renamed(Mapping[str, Tensor]):
    """Tensors under other names, taken when they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._tensors = tensors
        self._origin: dict[str, str] = {}
        for name, now in names.items():
            if now in self._origin:
                raise RunError(f"{name} and {self._origin[now]} are the same tensor ({now}); one of the two works")
            self._origin[now] = name

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._origin[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._origin

    def __iter__(self) -> Iterator[str]:
        return iter(self._origin)

    def __len__(self) -> int:
        return len(self._origin)


def _model_config(settings: Settings, found: dict[str, Any]) -> ModelConfig:
    try:
        return ModelConfig.model_validate(
            {"vocab_size": settings.count("vocab_size"), "hidden_size": settings.count("hidden_size"), **found}
        )
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(("model", *map(str, problem["loc"])))
        raise ConfigError(f"{settings.source}: {where}: {problem['msg'].removeprefix('Value error, ')}") from None


def _check_tied(tensors: Mapping[str, Tensor], source: str) -> None:
    if EMBEDDING in tensors and not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
        raise ConfigError(
            f"{source}: tie_word_embeddings is true, and {HEAD} is not {EMBEDDING}; false works, and keeps both"
        )
