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
from hydra_dist.errors import ConfigError


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


def choose_device(wanted: str, key: str = "train.device") -> torch.device:
    """The device of this process: its own GPU (by LOCAL_RANK) or the CPU. ConfigError where ``cuda`` is not there."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError(f"{key}: cuda: this machine has no GPU that torch can use; cpu or auto works")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own: this machine has {torch.cuda.device_count()}; "
            f"--nproc-per-node {torch.cuda.device_count()}, or train.device=cpu, works"
        )
    return torch.device("cuda", local_rank)


def build_mesh(config: Config, source: str) -> Mesh:
    """Join the process group and lay out the grid. A single process makes a group of one without torchrun."""
    world_size = world_size_from_environment()
    data_size = check_world_size(config, world_size, source)
    device = choose_device(config.train.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _join(device, timedelta(seconds=config.context.timeout_seconds), world_size)
    context_size = config.context.size
    grid = init_device_mesh(device.type, (data_size, context_size, 1), mesh_dim_names=("data", "ring", "ulysses"))
    return Mesh(
        device=device,
        rank=dist.get_rank(),
        world_size=world_size,
        data_rank=dist.get_rank() // context_size,
        data_size=data_size,
        context_size=context_size,
        context=grid["ring", "ulysses"] if context_size > 1 else None,
    )


def _join(device: torch.device, timeout: timedelta, world_size: int) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, rank=0, world_size=world_size, store=dist.HashStore())
