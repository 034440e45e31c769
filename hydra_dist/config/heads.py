"""Query and key heads, from counts or from compression, and what works where they do not come out.

Compression keeps ``head_dim``: query heads = hidden_size / (C1 x head_dim), key heads = hidden_size / (C2 x head_dim).
Everything here works on plain settings (name -> value), those of a model or of a layer laid over its model's.
"""

from collections.abc import Callable, Iterable, Mapping
from math import isqrt, lcm
from typing import Any

Settings = Mapping[str, Any]
Passes = Callable[[Settings], bool]
"""Whether the model would be accepted with these settings changed."""

KINDS = (("num_query_heads", "query_compression"), ("num_key_heads", "key_compression"))
COMPRESSIONS = ("compression_factor", "query_compression", "key_compression")
HEAD_KEYS = ("num_query_heads", "num_key_heads", *COMPRESSIONS)


def over_model(model: Settings, layer: Settings) -> dict[str, Any]:
    """A layer's settings laid over its model's: what it says of query (key) heads replaces all that the model says."""
    said = {key: layer[key] for key in HEAD_KEYS if layer.get(key) is not None}
    kept = {"hidden_size": model["hidden_size"], "head_dim": model["head_dim"]}
    for heads, own in KINDS:
        if not said.keys() & {heads, own, "compression_factor"}:
            kept[heads] = model[heads]
    return kept | said


def count_heads(settings: Settings) -> tuple[int, int] | None:
    """Query and key heads, or None where they do not come out whole or do not group."""
    counts = [_count(settings, heads, own) for heads, own in KINDS]
    return (counts[0], counts[1]) if all(counts) and counts[0] % counts[1] == 0 else None


def checked_heads(settings: Settings, where: str, passes: Passes) -> tuple[int, int]:
    """Query and key heads.

    Args:
        where: the section that the settings stand in, such as ``model``.
        passes: decides what may be suggested.

    Raises ValueError with the keys, their values and what works: heads that do not come out whole or do not group.
    """
    for heads, own in KINDS:
        if not _count(settings, heads, own):
            raise ValueError(_not_whole(settings, own, where, passes))
    counts = count_heads(settings)
    if counts is None:
        raise ValueError(_no_group(settings, where, passes))
    return counts


def check_head_dim(settings: Settings, passes: Passes) -> None:
    """ValueError for an odd ``head_dim``, whose dimensions cannot be rotated in pairs."""
    head_dim, hidden_size = settings["head_dim"], settings["hidden_size"]
    if head_dim % 2 == 0:
        return
    nearest = (d for off in range(1, min(2 * head_dim, 1024), 2) for d in (head_dim + off, head_dim - off) if d > 0)
    factor = lcm(*(settings.get(key) or 1 for key in COMPRESSIONS))
    widths = _multiples((head_dim + 1) * factor, hidden_size)
    changes: list[Settings] = [{"head_dim": d} for d in nearest]
    changes += [{"head_dim": head_dim + 1, "hidden_size": n} for n in widths]
    changes += [{"head_dim": head_dim + 1, "num_query_heads": 1, "num_key_heads": 1}]
    raise ValueError(f"model.head_dim {head_dim} is odd{_suggestion('model', changes, passes)}")


def listing(options: Iterable[object]) -> str:
    """``1 or 2 or 4``"""
    return " or ".join(str(option) for option in options)


def _count(settings: Settings, heads: str, own: str) -> int:
    """0 where it is no whole number."""
    if settings.get(heads) is not None:
        return int(settings[heads])
    heads_in_all, rest = divmod(settings["hidden_size"], settings["head_dim"])
    factor = _compression(settings, own)[1]
    return 0 if rest or heads_in_all % factor else heads_in_all // factor


def _compression(settings: Settings, own: str) -> tuple[str, int]:
    """The key that says how far heads are compressed, and its value."""
    key = own if settings.get(own) is not None else "compression_factor"
    return key, 1 if settings.get(key) is None else settings[key]


def _not_whole(settings: Settings, own: str, where: str, passes: Passes) -> str:
    key, factor = _compression(settings, own)
    hidden_size, head_dim = settings["hidden_size"], settings["head_dim"]
    heads_in_all, rest = divmod(hidden_size, head_dim)
    what = (
        f"{where}.{key} {factor}{'' if settings.get(key) else ' (as nothing is said of heads)'} leaves hidden_size "
        f"{hidden_size} / ({factor} x head_dim {head_dim}) heads, which is no integer"
    )
    if not rest and (works := [f for f in _divisors(heads_in_all) if passes({key: f})]):
        return f"{what}; {listing(works)} work{'' if len(works) > 1 else 's'}"
    together = lcm(*(settings.get(key) or 1 for key in COMPRESSIONS))
    changes: list[Settings] = []
    if where == "model":
        changes += [{"hidden_size": n} for n in _multiples(head_dim * together, hidden_size)]
        changes += [{"head_dim": d} for d in reversed(_divisors(hidden_size)) if d % 2 == 0 and d <= head_dim]
    changes += [{"num_query_heads": n, "num_key_heads": n} for n in _divisors(max(1, heads_in_all))]
    return what + _suggestion(where, changes, passes)


def _no_group(settings: Settings, where: str, passes: Passes) -> str:
    queries, keys = (_count(settings, heads, own) for heads, own in KINDS)
    below = queries // keys * keys
    query_options = [n for n in (below, below + keys) if n and passes({"num_query_heads": n})]
    key_options = [n for n in reversed(_divisors(queries)) if n <= keys and passes({"num_key_heads": n})][:1]
    options = [
        f"{listing(found)} {kind} heads" for found, kind in ((query_options, "query"), (key_options, "key")) if found
    ]
    if options:
        end = f"; {', or '.join(options)}{',' if len(options) > 1 else ''} work"
    else:
        end = _suggestion(where, [{"num_query_heads": n} for n in (below, below + keys) if n], passes)
    from_queries, from_keys = (_origin(settings, heads, own) for heads, own in KINDS)
    return (
        f"{where}.num_query_heads {queries}{from_queries} is not a multiple of "
        f"{where}.num_key_heads {keys}{from_keys}{end}"
    )


def _origin(settings: Settings, heads: str, own: str) -> str:
    if settings.get(heads) is not None:
        return ""
    key, factor = _compression(settings, own)
    return f" (from {key} {factor})"


def _suggestion(where: str, changes: Iterable[Settings], passes: Passes) -> str:
    """The first of ``changes`` that passes, as ``; model.key=value works``; as a last resort, with all layers alike."""
    changes = list(changes)
    if where == "model":
        changes += [{**change, "layer_settings": []} for change in changes]
    for change in changes:
        if passes(change):
            words = " with ".join(f"{where}.{key}={value}" for key, value in change.items())
            return f"; {words} works"
    return ""


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _multiples(step: int, near: int) -> list[int]:
    """A few multiples of ``step`` from ``near`` on."""
    first = -(-near // step)
    return [step * n for n in range(first, first + 8)]
