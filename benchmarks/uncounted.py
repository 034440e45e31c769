"""Emulated ranks whose messages are not counted as memory of the rank that sends them.

An emulated rank copies what it sends, and the copy waits until the receiver takes it. Processes have no such copy: what
they send is read where it lies. ``TensorMemory`` inside a rank then counts what a real rank holds.
"""

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from hydra_dist.context import EmulatedMesh
from hydra_dist.context.emulated import EmulatedTransport


class _Wire(EmulatedTransport):
    def _send(self, peer: int, tensor: Tensor, kind: str) -> Tensor:
        with _disable_current_modes():
            return super()._send(peer, tensor, kind)


def uncounted(mesh: EmulatedMesh) -> EmulatedMesh:
    """The mesh of an emulated rank, with its wires exchanged in place. Before a ``ContextParallel`` is made from it."""
    for name in ("ring", "ulysses", "world"):
        wire = getattr(mesh, name)
        setattr(mesh, name, _Wire(wire.hub, wire.group, wire.rank, wire.size, wire.device))
    return mesh
