"""The folder of a run's checkpoints: which names are good, and the renames by which one appears and another goes.

``step-00000100`` is a whole checkpoint and ``latest`` a text file with the name of one. Everything else is not yet or
no longer a checkpoint, and says so in its name:

- ``step-00000100.partial``: being written.
- ``step-00000100.replaced``: whole; a new checkpoint of the same step is about to take its name.
- ``step-00000100.deleted``: being removed.

A process may die between any two of the renames; the next save clears away what it left.
"""

import logging
import os
import re
import shutil
from pathlib import Path

from hydra_dist.errors import RunError
from hydra_dist.train.checkpoint.files import remove_if_there, replace_durably, sync_directory

logger = logging.getLogger(__name__)

LATEST = "latest"
_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_name(step: int) -> str:
    """``step-00000100`` for step 100."""
    return f"step-{step:08d}"


def complete_checkpoints(root: Path) -> list[str]:
    """Names of the whole checkpoints in a folder, oldest step first."""
    if not root.is_dir():
        return []
    steps = {int(match[1]): path.name for path in root.iterdir() if (match := _NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps)]


def latest(root: str | Path) -> Path | None:
    """The checkpoint to go on from: the one that ``latest`` names, or None where none was ever finished.

    Where the file is missing beside whole checkpoints (a run died before it could write its first), the newest of them.
    Raises RunError where the file names something that is not there.
    """
    root = Path(root)
    file = root / LATEST
    names = complete_checkpoints(root)
    try:
        name = file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return root / names[-1] if names else None
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{file} cannot be read ({error}); {_instead(root, names)}") from None
    if not _NAME.fullmatch(name):
        raise RunError(f"{file} names no checkpoint: {name[:80]!r}; {_instead(root, names)}")
    for path in (root / name, root / f"{name}.replaced"):
        if path.is_dir():
            return path
    raise RunError(f"{file} names {name}, which is not there; {_instead(root, names)}")


def instead_of(path: Path) -> str:
    """What to do where a checkpoint cannot be used: the newest other one that is there, and how to take it."""
    return _instead(path.parent, [name for name in complete_checkpoints(path.parent) if name != path.name])


def begin(root: Path, name: str) -> Path:
    """Clear away what an interrupted save left behind, and make the folder that this one writes into."""
    if not root.exists():
        root.mkdir(parents=True, exist_ok=True)
        sync_directory(root.parent)
    for path in sorted(root.iterdir()):
        base, _, ending = path.name.rpartition(".")
        if not _NAME.fullmatch(base):
            continue
        if ending == "replaced" and not (root / base).exists():
            os.rename(path, root / base)
        elif ending in ("partial", "deleted", "replaced"):
            _remove(path)
    remove_if_there(root / f"{LATEST}.partial")
    partial = root / f"{name}.partial"
    partial.mkdir()
    return partial


def publish(partial: Path, name: str) -> Path:
    """Give a folder that is whole and on the disk its good name, and then name it in ``latest``."""
    root = partial.parent
    final, replaced = root / name, root / f"{name}.replaced"
    if final.exists():
        os.rename(final, replaced)
    try:
        os.rename(partial, final)
    except OSError:
        if replaced.exists():
            os.rename(replaced, final)
        raise
    sync_directory(root)
    replace_durably(root / LATEST, f"{name}\n".encode())
    if replaced.exists():
        _remove(replaced)
    return final


def prune(root: Path, name: str, keep: int) -> None:
    """Remove the checkpoints older than ``name`` but for the newest ``keep - 1``.

    Newer ones stay: a run that was set back to ``name`` overwrites them as it passes. One that cannot be removed is
    left with a warning, for it costs space and nothing else.
    """
    older = [other for other in complete_checkpoints(root) if _step(other) < _step(name)]
    for other in older[: max(0, len(older) - (keep - 1))]:
        try:
            _remove(root / other)
        except OSError as error:
            logger.warning("%s: the old checkpoint could not be removed: %s", root / other, error.strerror)


def _remove(path: Path) -> None:
    """Take away the good name first: what is left of a removal that stops half-way is no checkpoint."""
    base = path.name if _NAME.fullmatch(path.name) else path.name.rpartition(".")[0]
    deleted = path.with_name(f"{base}.deleted")
    if path != deleted:
        if deleted.exists():
            shutil.rmtree(deleted)
        os.rename(path, deleted)
    shutil.rmtree(deleted)


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _instead(root: Path, names: list[str]) -> str:
    if names:
        return f"{names[-1]} is there: write that name into {root / LATEST} to go on from it"
    return f"no other checkpoint is there: remove {root} to start again"
