"""The built-in corpus: the source of the interpreter's own standard library.

About 1,800 Python files and 30 MB that every machine with Python already holds, so that a first training run needs
no download. Installed packages are not part of it.
"""

import os
import sysconfig
from pathlib import Path

from hydra_dist.data.documents import SourceFile
from hydra_dist.errors import ConfigError

STDLIB = "stdlib"
_EXCLUDED = {"site-packages", "dist-packages", "__pycache__"}


def stdlib_files(root: Path | None = None) -> list[SourceFile]:
    """The standard library's ``.py`` files, one document each, sorted by name; names start with ``stdlib/``.

    Args:
        root: where the library lies; None for this interpreter's.

    Raises:
        ConfigError: the interpreter carries no source (a zipped or stripped library).
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    files = []
    for directory, names, entries in os.walk(root):
        names[:] = [name for name in names if name not in _EXCLUDED]
        for entry in entries:
            path = Path(directory, entry)
            if path.suffix == ".py" and path.is_file():
                name = "/".join((STDLIB, *path.relative_to(root).parts))
                files.append(SourceFile(path, name, "stdlib", path.stat().st_size))
    if not files:
        raise ConfigError(
            f"--input stdlib: this Python has no library source in {root}; name a directory of text files instead"
        )
    return sorted(files, key=lambda file: os.fsencode(file.name))
