"""Models to and from the names and layouts of Hugging Face's transformers, without transformers itself.

``zaya`` (CCGQA layers; its experts are not ours, and our MLPs not its) and ``llama`` (a gqa model, whole). ``rules.py``
says how tensors are made from each other, ``files.py`` reads and writes the folders.

    imported = read_hugging_face("path/to/llama")
    model = Transformer(imported.config)
    load_weights(model, imported.weights)

``hydra_dist/export.py`` makes whole runs of such folders, and such folders of runs.
"""

from hydra_dist.model.interop.convert import (
    Exported,
    Imported,
    from_hugging_face,
    load_weights,
    patterns,
    read_hugging_face,
    to_hugging_face,
)
from hydra_dist.model.interop.files import CONFIG, new_folder, parse_size, write_json, write_weights

__all__ = [
    "CONFIG",
    "Exported",
    "Imported",
    "from_hugging_face",
    "load_weights",
    "new_folder",
    "parse_size",
    "patterns",
    "read_hugging_face",
    "to_hugging_face",
    "write_json",
    "write_weights",
]
