"""Checkpoints: one safetensors entry for each parameter and optimizer state, in shards, with a manifest and checksums.

    RUN/checkpoints/step-00000100/manifest.json
                                  weights-00000-of-00002.safetensors
                                  optimizer-00000-of-00002.safetensors  ...
    RUN/checkpoints/latest

Nothing is pickled, and nothing depends on the ZeRO stage or the number of ranks that wrote it. A checkpoint is complete
or it does not exist: everything is written and brought to the disk under another name, renamed when it is whole, and
named in ``latest`` last of all. What one rank cannot do, all ranks report, as one error.
"""

from hydra_dist.train.checkpoint.folder import complete_checkpoints, latest
from hydra_dist.train.checkpoint.manifest import Manifest, check_same_model, read_manifest
from hydra_dist.train.checkpoint.peers import Peers
from hydra_dist.train.checkpoint.reading import load, load_weights, verify
from hydra_dist.train.checkpoint.state import State
from hydra_dist.train.checkpoint.writing import save

__all__ = [
    "Manifest",
    "Peers",
    "State",
    "check_same_model",
    "complete_checkpoints",
    "latest",
    "load",
    "load_weights",
    "read_manifest",
    "save",
    "verify",
]
