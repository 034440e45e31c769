"""Writing a checkpoint: every rank its shards, the first rank the manifest and the good name."""

import errno
import platform
import shutil
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

import hydra_dist
from hydra_dist.errors import RunError
from hydra_dist.train.checkpoint.files import ShardWriter, TensorInfo, sync_directory, write_durably
from hydra_dist.train.checkpoint.folder import begin, checkpoint_name, complete_checkpoints, prune, publish
from hydra_dist.train.checkpoint.manifest import MANIFEST, encode_manifest
from hydra_dist.train.checkpoint.peers import Peers
from hydra_dist.train.checkpoint.state import WEIGHT, State, deal, stored_name


class _Entry(NamedTuple):
    """One tensor of a parameter, the rank that writes it, and the file and the name under which it goes."""

    parameter: str
    key: str
    owner: int
    file: str
    info: TensorInfo


def save(
    root: str | Path,
    step: int,
    state: State,
    *,
    metadata: Mapping[str, Any],
    keep: int = 2,
    peers: Peers | None = None,
) -> Path:
    """Write the checkpoint of ``step`` into ``root``, name it in ``latest``, and remove older ones beyond ``keep``.

    Collective. Parameters are dealt to the ranks by size; each rank collects and writes its own, one tensor at a time.

    Args:
        root: the run's ``checkpoints`` folder, on storage that all ranks share.
        step: updates done. A checkpoint of the same step is replaced.
        metadata: ``data_step``, ``context_size``, ``precision``, ``model`` (``ModelConfig`` as JSON),
            ``tokenizer_sha256``, and ``extra`` with whatever else is to be kept as JSON. Taken from the first rank.
        keep: how many checkpoints stay, this one included; never less than this one.
        peers: the ranks; None: all of torch.distributed's default group, or one where there is none.

    Returns:
        The checkpoint's folder.

    Raises RunError on every rank where any rank could not write; the checkpoints that were there stay.
    """
    root, name, peers = Path(root), checkpoint_name(step), peers or Peers()
    partial = root / f"{name}.partial"
    entries = _plan(state, peers.size)
    try:
        peers.together(lambda: begin(root, name) if peers.rank == 0 else None)
        parts = peers.together(lambda: _write(partial, entries, state, peers.rank))
        files = {file: record for part in parts for file, record in part.items()}
        manifest = encode_manifest(_manifest_content(step, state, metadata, entries, files, peers.size))
        peers.together(lambda: _finish(partial, name, manifest, files) if peers.rank == 0 else None)
    except OSError as error:
        if peers.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise RunError(_failure(root, name, error, sum(entry.info.num_bytes for entry in entries))) from None
    if peers.rank == 0:
        prune(root, name, keep)
    return root / name


def _plan(state: State, num_ranks: int) -> list[_Entry]:
    """Who writes which tensor where, in the order in which all ranks collect them: the same on every rank."""
    tensors = {
        name: [(key, TensorInfo(stored_name(name, key), state.dtype(name, key), state.shape(name))) for key in keys]
        for name in state.names
        if (keys := state.keys(name))
    }
    sizes = {name: sum(info.num_bytes for _, info in infos) for name, infos in tensors.items()}
    num_shards = max(1, min(num_ranks, len(sizes)))
    owners = {name: rank for rank, names in enumerate(deal(sizes, num_shards)) for name in names}
    entries = []
    for name, infos in tensors.items():
        shard = f"{owners[name]:05d}-of-{num_shards:05d}.safetensors"
        for key, info in infos:
            file = f"{'weights' if key == WEIGHT else 'optimizer'}-{shard}"
            entries.append(_Entry(name, key, owners[name], file, info))
    # Wide dtypes first, as a shard wants them; within one dtype in the model's order.
    return sorted(entries, key=lambda entry: -entry.info.dtype.itemsize)


def _write(partial: Path, entries: list[_Entry], state: State, rank: int) -> dict[str, dict[str, Any]]:
    """Write this rank's shards; bytes and sha256 of each.

    A rank that cannot write goes on taking part in collecting what the others write, and raises at the end.
    """
    mine = defaultdict(list)
    for entry in entries:
        if entry.owner == rank:
            mine[entry.file].append(entry.info)
    problem: OSError | None = None
    writers: dict[str, ShardWriter] = {}
    with ExitStack() as stack:
        try:
            # On network storage the folder that the first rank made may not be visible here yet.
            partial.mkdir(parents=True, exist_ok=True)
            for file, infos in mine.items():
                writers[file] = stack.enter_context(ShardWriter(partial / file, infos))
        except OSError as error:
            problem = error
        for entry in entries:
            wanted = entry.owner == rank and problem is None
            tensor = state.read_tensor(entry.parameter, entry.key, wanted)
            if wanted and tensor is not None:
                try:
                    writers[entry.file].write(tensor)
                except OSError as error:
                    problem = error
        if problem is not None:
            raise problem
        return {file: {"bytes": writer.num_bytes, "sha256": writer.finish()} for file, writer in writers.items()}


def _manifest_content(
    step: int,
    state: State,
    metadata: Mapping[str, Any],
    entries: list[_Entry],
    files: dict[str, dict[str, Any]],
    world_size: int,
) -> dict[str, Any]:
    parameters: dict[str, dict[str, Any]] = {name: {} for name in state.names}
    for entry in entries:
        parameters[entry.parameter][entry.key] = {
            "file": entry.file,
            "shape": list(entry.info.shape),
            "dtype": str(entry.info.dtype).removeprefix("torch."),
        }
    return {
        "step": step,
        "optimizer_step": state.step,
        "world_size": world_size,
        "zero_stage": state.stage,
        **metadata,
        "versions": {"hydra_dist": hydra_dist.__version__, "python": platform.python_version(), **_versions()},
        "parameters": parameters,
        "files": dict(sorted(files.items())),
    }


def _finish(partial: Path, name: str, manifest: bytes, files: dict[str, dict[str, Any]]) -> None:
    """The first rank's part: the manifest, once every shard is seen to be there, and then the good name."""
    for file, record in files.items():
        if not (partial / file).is_file() or (partial / file).stat().st_size != record["bytes"]:
            raise OSError(
                errno.ENOENT, "another rank wrote it and the first cannot see it: is run.directory on shared storage?",
                str(partial / file),
            )  # fmt: skip
    write_durably(partial / MANIFEST, manifest)
    sync_directory(partial)
    publish(partial, name)


def _failure(root: Path, name: str, error: OSError, num_bytes: int) -> str:
    try:
        names = complete_checkpoints(root)
    except OSError:  # the folder itself cannot be read
        names = []
    left = f"{', '.join(names)} is whole and stays" if names else "there is no other one"
    space = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        space = f"; a checkpoint takes {num_bytes / 2**30:.2f} GiB: free that much, or lower checkpoint.keep"
    return f"{root}: checkpoint {name} could not be finished: {error}; {left}{space}"


def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    for package in ("deepspeed", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a state without DeepSpeed
            continue
    return found
