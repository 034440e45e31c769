"""Whether a run may go on from a checkpoint: same model, tokenizer and optimizer, and the same rows in each step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra_dist.config import Config, ModelConfig
from hydra_dist.errors import ConfigError
from hydra_dist.train import checkpoint


def kept_settings(config: Config, data_size: int) -> dict[str, Any]:
    """What a checkpoint keeps of its run beside the model: the optimizer, and what decides which rows a step reads.

    Args:
        data_size: data replicas.
    """
    train = config.train
    return {
        "optimizer.name": config.optimizer.name,
        "train.seed": train.seed,
        "data.sequence_length": config.data.sequence_length,
        "rows_per_step": data_size * train.micro_batch_size * train.gradient_accumulation_steps,
    }


def check_resume(
    path: Path, config: Config, model: ModelConfig, tokenizer_sha256: str, data_size: int, source: str
) -> int:
    """The step that a run of ``config`` goes on after, from the checkpoint at ``path``.

    Raises ConfigError where the checkpoint is another run's, RunError where its manifest is damaged.
    """
    manifest = checkpoint.read_manifest(path)
    if manifest.tokenizer_sha256 not in (None, tokenizer_sha256):
        raise ConfigError(
            f"{source}: {path} was trained with another tokenizer than that of data.directory "
            f"{config.data.directory}; the data.directory of that run, or another run.directory, works"
        )
    checkpoint.check_same_model(manifest, model, path)
    here = kept_settings(config, data_size)
    for key in ("optimizer.name", "train.seed", "data.sequence_length"):
        saved = manifest.extra.get(key, here[key])
        if saved != here[key]:
            raise ConfigError(
                f"{source}: {key} is {here[key]}, and {path} was trained with {saved}; "
                f"{key}={saved}, or another run.directory, works"
            )
    _check_rows(manifest.extra, here["rows_per_step"], config, data_size, path, source)
    return manifest.step


def _check_rows(
    saved: Mapping[str, object], rows_here: int, config: Config, data_size: int, path: Path, source: str
) -> None:
    """Refuse to go on where a step would read another number of rows: some would come twice and others never."""
    rows = saved.get("rows_per_step", rows_here)
    if rows == rows_here or not isinstance(rows, int):
        return
    remedy = "another run.directory works"
    for micro in (config.train.micro_batch_size, 1):
        if rows % (data_size * micro) == 0:
            steps = rows // (data_size * micro)
            remedy = f"train.micro_batch_size={micro} train.gradient_accumulation_steps={steps} works"
            break
    raise ConfigError(
        f"{source}: a step reads {rows_here} rows on {data_size} data replicas, and {path} was trained with {rows} "
        f"rows a step; {remedy}"
    )
