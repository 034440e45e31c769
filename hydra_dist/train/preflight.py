"""Everything that can be known before a process is started: the same checks for ``hydra-dist check`` and for a run.

Nothing is written but a probe file in the run's folder, which vanishes again.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from hydra_dist.config import Config, ModelConfig
from hydra_dist.config.file import check_world_size
from hydra_dist.costs.parameters import count_parameters
from hydra_dist.data import Dataset, Sampler
from hydra_dist.errors import ConfigError, RunError, UserError
from hydra_dist.train import checkpoint
from hydra_dist.train.resume import check_resume

BYTES_PER_PARAMETER_ON_DISK = 12
"""fp32 weight and two fp32 moments."""


@dataclass(frozen=True)
class Prepared:
    """What the checks found."""

    model: ModelConfig
    """With the vocabulary size filled in."""
    train: Sampler
    held_out: Sampler | None
    """None where the corpus was prepared without held-out documents."""
    data_size: int
    """Data replicas."""
    resume_from: Path | None
    """The newest checkpoint of the run's folder."""
    resume_step: int


def preflight(config: Config, source: str, world_size: int, *, verify_data: bool = False) -> Prepared:
    """Check a configuration against the data, the disk, the run's folder and the number of processes.

    Args:
        source: what stands before a message, the configuration's path.
        verify_data: read every shard, and the checkpoint to go on from, and compare checksums.

    Raises ConfigError or RunError with one readable message.
    """
    data_size = check_world_size(config, world_size, source)
    try:
        rows, held_out = _open_data(config, verify_data)
    except UserError as error:
        raise type(error)(f"{source}: data.directory: {error}") from None
    vocab_size = rows.dataset.vocab_size
    if config.model.vocab_size is not None and config.model.vocab_size < vocab_size:
        raise ConfigError(
            f"{source}: model.vocab_size {config.model.vocab_size} is smaller than the {vocab_size} entries of the "
            f"tokenizer in data.directory {config.data.directory}; model.vocab_size={vocab_size} works"
        )
    model = config.model.model_copy(update={"vocab_size": config.model.vocab_size or vocab_size})
    run = Path(config.run.directory)
    _check_writable(run, source)
    newest = checkpoint.latest(run / "checkpoints")
    step = 0
    if newest is not None:
        step = check_resume(newest, config, model, rows.dataset.tokenizer_sha256, data_size, source)
        if verify_data:
            checkpoint.verify(newest)
    _check_space(config, model, run, source)
    return Prepared(model, rows, held_out, data_size, newest, step)


def check_device(config: Config, device: torch.device) -> None:
    """ConfigError for what the device that ``train.device: auto`` came to has no use for."""
    if config.train.activation_offload and device.type == "cpu":
        raise ConfigError(
            "train.activation_offload true: this machine has no GPU that torch can use, and the memory of a CPU run is "
            "the host's already; train.activation_offload=false works"
        )


def _open_data(config: Config, verify: bool) -> tuple[Sampler, Sampler | None]:
    """The training rows, and the held-out ones where any document was held out."""
    directory, length, seed = Path(config.data.directory), config.data.sequence_length, config.train.seed
    train = Dataset(directory, "train", verify=verify)
    if not train.manifest.shards("eval"):
        return Sampler(train, length, seed), None
    return Sampler(train, length, seed), Sampler(Dataset(directory, "eval", verify=verify), length, seed)


def _check_writable(directory: Path, source: str) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"x")
    except OSError as error:
        raise ConfigError(
            f"{source}: run.directory {directory} cannot be written: {error.strerror}; "
            "run.directory=runs/NAME in a folder of yours works"
        ) from None


def _check_space(config: Config, model: ModelConfig, run: Path, source: str) -> None:
    # One more than are kept: the newest is whole before the oldest goes.
    needed = count_parameters(model).total * BYTES_PER_PARAMETER_ON_DISK * (config.checkpoint.keep + 1)
    free = shutil.disk_usage(run).free
    if needed > free:
        raise RunError(
            f"{source}: run.directory {run} has {free / 2**30:.1f} GiB free, and {config.checkpoint.keep + 1} "
            f"checkpoints of this model take {needed / 2**30:.1f} GiB; a smaller checkpoint.keep or another disk works"
        )
