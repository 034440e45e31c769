"""Which layers the entries of ``model.layer_settings`` are for: ranges spelled out, mistakes named.

Entries are plain data here, as they come from a file; what is of a wrong type is left for the fields to refuse.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any

from hydra_dist.errors import nearest

RANGE = re.compile(r"\s*(\d{1,9})\s*(-\s*(\d{1,9})?)?\s*")
"""``3``, ``0-2`` or ``3-``."""


def with_layers(entries: Any, num_layers: int, own_keys: Collection[str], model_keys: Collection[str]) -> Any:
    """``entries`` with each one's ``layers`` as a list of numbers.

    Args:
        own_keys: what an entry may set, and ``layers``.
        model_keys: what a model may set.

    Raises ValueError with one message: an unknown key, an entry that sets nothing, a layer that does not exist or is
    named twice, text that is no range.
    """
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, dict) for entry in entries):
        return entries
    named: list[list[Any]] = []
    for index, entry in enumerate(entries):
        _check_keys(entry, f"model.layer_settings.{index}", own_keys, model_keys)
        named.append(_numbers(entry.get("layers"), f"model.layer_settings.{index}.layers", num_layers))
    if all(type(layer) is int for layers in named for layer in layers):
        for index in range(len(named)):
            _check_layers(index, named, num_layers)
    return [{**entry, "layers": layers} if layers else entry for entry, layers in zip(entries, named, strict=True)]


def spelled(layers: Iterable[int]) -> str:
    """Numbers as a user may write them: ``[0-2, 5]``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return f"[{', '.join(str(first) if first == last else f'{first}-{last}' for first, last in runs)}]"


def _check_keys(entry: dict[str, Any], where: str, own_keys: Collection[str], model_keys: Collection[str]) -> None:
    for key in entry:
        if key in own_keys:
            continue
        if key in model_keys:
            raise ValueError(f"{where}.{key}: is the same in all layers; it belongs in model:")
        known = nearest(str(key), own_keys) or f"; an entry has {', '.join(own_keys)}"
        raise ValueError(f"{where}.{key}: unknown key{known}")
    if entry.keys() <= {"layers"}:
        raise ValueError(
            f"{where}: sets nothing; a key beside layers, such as compression_factor, or no such entry, works"
        )


def _numbers(spec: Any, where: str, num_layers: int) -> list[Any]:
    """Ranges spelled out, as far as there are layers and one further; anything else as it is."""
    found: list[Any] = []
    for item in spec if isinstance(spec, list | tuple) else [] if spec is None else [spec]:
        if not isinstance(item, str):
            found.append(item)
            continue
        match = RANGE.fullmatch(item)
        first = int(match[1]) if match else 0
        last = first if not match or not match[2] else int(match[3]) if match[3] else max(first, num_layers - 1)
        if not match or last < first:
            raise ValueError(
                f"{where}: {item!r} is no layer and no range of layers; a number such as 0 or a range such as "
                f"0-{num_layers - 1} is read"
            )
        found += range(first, min(last, max(first, num_layers)) + 1)
    return found


def _check_layers(index: int, named: list[list[int]], num_layers: int) -> None:
    layers, where = named[index], f"model.layer_settings.{index}.layers"
    others = {layer: other for other, entry in enumerate(named) if other != index for layer in entry}
    free = [layer for layer in range(num_layers) if layer not in others]
    works = sorted({layer for layer in layers if layer in free}) or free
    end = f"; {where}={spelled(works)} works" if works else "; the configuration without this entry works"
    for place, layer in enumerate(layers):
        if not 0 <= layer < num_layers:
            raise ValueError(f"{where} has {layer}, and the last of {num_layers} layers is {num_layers - 1}{end}")
        if layer in layers[:place]:
            raise ValueError(f"{where} has {layer} twice{end}")
        if layer in others:
            raise ValueError(f"{where} has {layer}, which model.layer_settings.{others[layer]} has as well{end}")
