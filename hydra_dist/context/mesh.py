"""From a mesh to transports: which ranks share a sequence, and over which wires."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from hydra_dist.context.distributed import DistributedTransport
from hydra_dist.context.emulated import EmulatedMesh
from hydra_dist.context.transport import OneRank, Transport
from hydra_dist.errors import ConfigError

AnyMesh = DeviceMesh | EmulatedMesh | None
DIMENSIONS = ("ring", "ulysses")


def transports(mesh: AnyMesh, timeout: float | None) -> tuple[Transport, Transport]:
    """The transports along the ring and the Ulysses dimension of a mesh.

    Args:
        mesh: a DeviceMesh with the dimensions ``ring`` and ``ulysses`` (either may be missing), an emulated one, or
            None for one device. For a DeviceMesh all of its ranks call this at the same point: it makes a communicator
            for each dimension with more than one rank, apart from those the mesh and ZeRO use.
        timeout: seconds to wait for a peer; None takes the limit of the process group or of the emulated run, and the
            shorter of the two holds for an emulated one.
    """
    if mesh is None:
        one = OneRank(torch.device("cpu"))
        return one, one
    if isinstance(mesh, EmulatedMesh):
        if timeout is not None:
            mesh.hub.timeout = min(mesh.hub.timeout, timeout)
        return mesh.ring, mesh.ulysses
    names = mesh.mesh_dim_names or ()
    unknown = [name for name in names if name not in DIMENSIONS]
    if unknown or not names:
        raise ConfigError(
            f"the context mesh has the dimensions {list(names)}; ring and ulysses are what it may have, so pass "
            f'mesh["ring", "ulysses"]'
        )
    device = torch.device(mesh.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    ring, ulysses = (_along(mesh, name, device, timeout) for name in DIMENSIONS)
    return ring, ulysses


def _along(mesh: DeviceMesh, name: str, device: torch.device, timeout: float | None) -> Transport:
    """The transport along one dimension, over a group of its own."""
    names = mesh.mesh_dim_names or ()
    if name not in names or mesh.size(names.index(name)) == 1:
        return OneRank(device)
    ranks = dist.get_process_group_ranks(mesh.get_group(name))
    # Only the members of a row know it, so only they take part in making its group.
    limit = None if timeout is None else timedelta(seconds=timeout)
    group = dist.new_group(ranks, timeout=limit, use_local_synchronization=True)
    assert group is not None, "a rank is a member of its own row"
    return DistributedTransport(group, device, timeout)
