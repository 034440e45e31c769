"""The processes of a run as a grid: data replicas x context (ring x Ulysses), one process a rank.

Ranks of one context group are neighbours, so that a sequence stays within a node as far as it can.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hydra_dist.config import Config
from hydra_dist.config.file import check_world_size
from hydra_dist.costs.strategy import Choice, resolve
from hydra_dist.errors import ConfigError, nearest

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Mesh:
    """Where this process stands. ``context`` is None where one rank holds whole sequences."""

    device: torch.device
    rank: int
    world_size: int
    data_rank: int
    data_size: int
    context_size: int
    context: DeviceMesh | None
    choice: Choice
    """How the ranks of one sequence share it."""

    @property
    def is_first(self) -> bool:
        """The one rank that speaks and writes."""
        return self.rank == 0


def world_size_from_environment() -> int:
    """Processes of this run as torchrun announces them; 1 where it did not start us."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank_from_environment() -> int:
    """This process's rank as torchrun announces it; 0 where it did not start us."""
    return int(os.environ.get("RANK", "0"))


def choose_device(wanted: str, key: str = "train.device", share_gpu: bool = False) -> torch.device:
    """The device of this process: its own GPU (by LOCAL_RANK), one that it shares, or the CPU.

    Raises:
        ConfigError: ``cuda`` is not there, or there are fewer GPUs than processes and they may not be shared.
    """
    if wanted not in DEVICES:
        raise ConfigError(f"{key}: {wanted}{nearest(wanted, DEVICES)}; {' or '.join(DEVICES)} works")
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError(f"{key}: cuda: this machine has no GPU that torch can use; cpu or auto works")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if share_gpu:
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own: this machine has {torch.cuda.device_count()}; "
            f"--nproc-per-node {torch.cuda.device_count()}, train.share_gpu=true (slow), or train.device=cpu, works"
        )
    return torch.device("cuda", local_rank)


def build_mesh(config: Config, source: str) -> Mesh:
    """Join the process group and lay out the grid. A single process makes a group of one without torchrun."""
    world_size = world_size_from_environment()
    data_size = check_world_size(config, world_size, source)
    device = choose_device(config.train.device, share_gpu=config.train.share_gpu)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" and not config.train.share_gpu else "gloo"
        _join(backend, timedelta(seconds=config.context.timeout_seconds), world_size)
    context_size = config.context.size
    choice = resolve(config)
    shape = (data_size, choice.chosen.ring, choice.chosen.ulysses)
    grid = init_device_mesh(device.type, shape, mesh_dim_names=("data", "ring", "ulysses"))
    return Mesh(
        device=device,
        rank=dist.get_rank(),
        world_size=world_size,
        data_rank=dist.get_rank() // context_size,
        data_size=data_size,
        context_size=context_size,
        context=grid["ring", "ulysses"] if context_size > 1 else None,
        choice=choice,
    )


def _join(backend: str, timeout: timedelta, world_size: int) -> None:
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, rank=0, world_size=world_size, store=dist.HashStore())
