"""From a mesh to transports: which ranks share a sequence, and over which wires."""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from hydra_dist.context.distributed import DistributedTransport
from hydra_dist.context.emulated import EmulatedMesh
from hydra_dist.context.transport import OneRank, Traffic, Transport
from hydra_dist.errors import ConfigError

AnyMesh = DeviceMesh | EmulatedMesh | None
DIMENSIONS = ("ring", "ulysses")


@dataclass(frozen=True)
class Wires:
    """This rank's transports: along the two dimensions of the grid, and to ``all`` ranks that share a sequence.

    Rank r of all is rank r // U of its ring and r % U of its Ulysses group.
    """

    ring: Transport
    ulysses: Transport
    all: Transport

    def counting(self, traffic: Traffic) -> "Wires":
        """The same wires, with their counts in ``traffic``."""
        return Wires(*(wire.counting(traffic) for wire in (self.ring, self.ulysses, self.all)))


def wires(mesh: AnyMesh, timeout: float | None) -> Wires:
    """The transports of a mesh.

    Args:
        mesh: a DeviceMesh with the dimensions ``ring`` and ``ulysses`` (either may be missing), an emulated one, or
            None for one device. For a DeviceMesh all of its ranks call this at the same point: it makes a communicator
            for each dimension with more than one rank, and for all ranks where both have, apart from those the mesh and
            ZeRO use.
        timeout: seconds to wait for a peer; None takes the limit of the process group or of the emulated run, and the
            shorter of the two holds for an emulated one.
    """
    if mesh is None:
        one = OneRank(torch.device("cpu"))
        return Wires(one, one, one)
    if isinstance(mesh, EmulatedMesh):
        if timeout is not None:
            mesh.hub.timeout = min(mesh.hub.timeout, timeout)
        return _joined(mesh.ring, mesh.ulysses, mesh.world)
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
    if min(ring.size, ulysses.size) == 1:
        return _joined(ring, ulysses, None)
    grid = mesh.mesh if names == DIMENSIONS else mesh.mesh.t()
    return _joined(ring, ulysses, _over(grid.flatten().tolist(), device, timeout))


def _joined(ring: Transport, ulysses: Transport, everyone: Transport | None) -> Wires:
    if ulysses.size == 1:
        return Wires(ring, ulysses, ring)
    if ring.size == 1 or everyone is None:
        return Wires(ring, ulysses, ulysses)
    return Wires(ring, ulysses, everyone)


def _along(mesh: DeviceMesh, name: str, device: torch.device, timeout: float | None) -> Transport:
    """The transport along one dimension, over a group of its own."""
    names = mesh.mesh_dim_names or ()
    if name not in names or mesh.size(names.index(name)) == 1:
        return OneRank(device)
    return _over(dist.get_process_group_ranks(mesh.get_group(name)), device, timeout)


def _over(ranks: list[int], device: torch.device, timeout: float | None) -> Transport:
    # Only the members of a group know it, so only they take part in making it.
    if ranks != sorted(ranks):
        raise ConfigError(f"the ranks {ranks} of the context mesh must be in ascending order")
    limit = None if timeout is None else timedelta(seconds=timeout)
    group = dist.new_group(ranks, timeout=limit, use_local_synchronization=True)
    assert group is not None, "a rank is a member of its own group"
    return DistributedTransport(group, device, timeout)
