"""Everything that can be known before a process is started: the same checks for ``hydra-dist check`` and for a run.

Nothing is written but a probe file in the run's folder, which vanishes again.
"""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hydra_dist.config import Config, ModelConfig
from hydra_dist.config_file import check_world_size
from hydra_dist.costs.parameters import count_parameters
from hydra_dist.data import Dataset, Sampler
from hydra_dist.errors import ConfigError, RunError
from hydra_dist.train import checkpoint

BYTES_PER_PARAMETER_ON_DISK = 12
"""fp32 weight and two fp32 moments."""


@dataclass(frozen=True)
class Prepared:
    """What the checks found."""

    model: ModelConfig
    """With the vocabulary size filled in."""
    train: Sampler
    held_out: Sampler
    data_size: int
    """Data replicas."""
    resume_from: Path | None
    """The newest checkpoint of the run's folder."""
    resume_step: int


def preflight(config: Config, source: str, world_size: int, *, verify_data: bool = False) -> Prepared:
    """Check a configuration against the data, the disk, the run's folder and the number of processes.

    Args:
        source: what stands before a message, the configuration's path.
        verify_data: read every shard and compare its checksum.

    Raises ConfigError or RunError with one readable message.
    """
    data_size = check_world_size(config, world_size, source)
    directory = Path(config.data.directory)
    train = Dataset(directory, "train", verify=verify_data)
    evaluation = Dataset(directory, "eval", verify=verify_data)
    vocab_size = train.vocab_size
    if config.model.vocab_size is not None and config.model.vocab_size < vocab_size:
        raise ConfigError(
            f"{source}: model.vocab_size {config.model.vocab_size} is smaller than the {vocab_size} entries of the "
            f"tokenizer in data.directory {directory}; model.vocab_size={vocab_size} works"
        )
    model = config.model.model_copy(update={"vocab_size": config.model.vocab_size or vocab_size})
    length = config.data.sequence_length
    rows, held_out = (Sampler(split, length, config.train.seed) for split in (train, evaluation))
    run = Path(config.run.directory)
    _check_writable(run, source)
    newest = checkpoint.latest(run / "checkpoints")
    step = 0
    if newest is not None:
        manifest = checkpoint.read_manifest(newest)
        checkpoint.check_same_model(manifest, model, newest)
        _check_same_order(manifest.extra, config, data_size, newest, source)
        step = manifest.step
    _check_space(config, model, run, source)
    return Prepared(model, rows, held_out, data_size, newest, step)


def data_order(config: Config, data_size: int) -> dict[str, int]:
    """What decides, with the step, which tokens a step reads; kept in the checkpoint."""
    train = config.train
    return {
        "seed": train.seed,
        "sequence_length": config.data.sequence_length,
        "rows_per_step": data_size * train.micro_batch_size * train.gradient_accumulation_steps,
    }


def _check_same_order(
    saved: Mapping[str, object], config: Config, data_size: int, checkpoint_path: Path, source: str
) -> None:
    """Refuse to go on where a step would read other tokens than it did: some would come twice and others never."""
    here = data_order(config, data_size)
    keys = {"seed": "train.seed", "sequence_length": "data.sequence_length"}
    for name, key in keys.items():
        if saved.get(name, here[name]) != here[name]:
            raise ConfigError(
                f"{source}: {key} is {here[name]}, and {checkpoint_path} was trained with {saved[name]}; "
                f"{key}={saved[name]}, or another run.directory, works"
            )
    rows = saved.get("rows_per_step", here["rows_per_step"])
    if rows != here["rows_per_step"]:
        assert isinstance(rows, int)
        remedy = "another run.directory works"
        for micro in (config.train.micro_batch_size, 1):
            if rows % (data_size * micro) == 0:
                steps = rows // (data_size * micro)
                remedy = f"train.micro_batch_size={micro} train.gradient_accumulation_steps={steps} works"
                break
        raise ConfigError(
            f"{source}: a step reads {here['rows_per_step']} rows on {data_size} data replicas, and {checkpoint_path} "
            f"was trained with {rows} rows a step; {remedy}"
        )


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
