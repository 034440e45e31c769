"""Reading a configuration file with ``section.key=value`` changes, and saying what is wrong with it in one message."""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hydra_dist.config import Config
from hydra_dist.errors import ConfigError, nearest


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers: PyYAML follows 1.1, which reads ``3e-4`` as text."""


def _mapping_without_repeats(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f'"{key.value}" stands twice', key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_repeats)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The checked configuration in the YAML file ``path`` after ``overrides`` (``section.key=value``, value in YAML).

    Raises ConfigError: file missing or no YAML, unknown key (with the nearest known one), wrong type or range,
    settings that do not fit each other.
    """
    settings = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(settings, override)
    return build_config(settings, source=str(path))


def build_config(settings: dict[str, Any], source: str = "configuration") -> Config:
    """The checked configuration in plain dictionaries; ``source`` stands before every message."""
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(f"{source}: {problem}" for problem in problems)) from None


def dump_config(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that ``load_config`` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def check_world_size(config: Config, world_size: int, source: str = "configuration") -> int:
    """Number of data replicas that ``world_size`` processes make; ConfigError where they make no whole number."""
    size = config.context.size
    if world_size % size:
        below = world_size // size * size
        counts = " or ".join(str(n) for n in (below, below + size) if n)
        divisor = max(n for n in range(1, min(size, world_size) + 1) if world_size % n == 0)
        raise ConfigError(
            f"{source}: context.size {size} does not divide the {world_size} processes; "
            f"{counts} processes, or context.size={divisor}, work"
        )
    return world_size // size


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        others = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; {path.parent} has {', '.join(others)}" if others else ""
        raise ConfigError(f"{path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: holds {type(settings).__name__}, not sections such as model: and data:")
    return settings


def _apply_override(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or len(parts) != 2 or not all(parts):
        raise ConfigError(f"{override}: not of the form section.key=value, such as train.steps=100")
    section = settings.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise ConfigError(f"{override}: {parts[0]} holds {section!r} in the file, not a section")
    try:
        section[parts[1]] = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"{override}: the value is not YAML") from None


def _describe(problem: ErrorDetails) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    value = problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key{_where_it_belongs(problem['loc'])}"
        case "missing":
            return f"{key}: missing; it has no default"
        case "value_error":
            return problem["msg"].removeprefix("Value error, ")
        case "model_type" | "model_attributes_type":
            return f"{key}: {value!r} is not a section of keys and values"
        case _:
            return f"{key}: {value!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _where_it_belongs(location: tuple[int | str, ...]) -> str:
    """The key that was probably meant: in the same section, or the section that has a key of this name."""
    name = str(location[-1])
    sections: dict[str, type[BaseModel]] = {
        section: field.annotation
        for section, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    if len(location) == 1:
        homes = [section for section, model in sections.items() if name in model.model_fields]
        return (
            f"; it belongs in {homes[0]}:" if homes else nearest(name, sections) or f"; sections: {', '.join(sections)}"
        )
    own = sections[str(location[0])].model_fields
    if hint := nearest(name, own):
        return hint
    homes = [section for section, model in sections.items() if name in model.model_fields]
    return f"; it belongs in {homes[0]}:" if homes else f"; {location[0]} has {', '.join(own)}"
