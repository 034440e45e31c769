"""The ranks that share sequences, and how: made once, it gives a plan for each batch.

The plan (``plan.py``) says who holds which rows, and does the two things in a layer that cross rows: attention, and the
halo before each chunk.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hydra_dist.context.documents import documents_of
from hydra_dist.context.geometry import Geometry
from hydra_dist.context.mesh import AnyMesh, wires
from hydra_dist.context.plan import SequencePlan
from hydra_dist.context.transport import Traffic
from hydra_dist.costs.layout import LAYOUTS, Dealing, check_dealing, chunks, cut
from hydra_dist.costs.rotation import RingPath
from hydra_dist.errors import ConfigError, nearest

STRATEGIES = ("ring", "all_gather", "ulysses", "hybrid")
_GEOMETRIES_KEPT = 8


class ContextParallel:
    """The ranks that share a sequence, and how they do it.

    Args:
        mesh: a DeviceMesh with the dimensions ``ring`` and ``ulysses``, the mesh of an emulated rank, or None for one
            device. All ranks of a DeviceMesh make their ContextParallel at the same point of the program, once.
        strategy: ``ring``: keys and values go around. ``all_gather``: each rank is sent the keys and values that it
            needs. ``ulysses``: ranks exchange rows for heads. ``hybrid``: Ulysses along one dimension of the mesh, a
            ring along the other.
        layout: see ``costs.layout``: ``zigzag``, ``contiguous``, ``striped`` or ``balanced``. It deals rows to the
            ranks of the ring; those of one Ulysses group share what their ring rank is dealt, one run of rows each.
        timeout: seconds that a rank waits for another one; None takes the process group's limit.
        inner_ring: ranks of the ring that share a node, for a ring of rings: keys visit all ranks of a node before they
            go to the next one. None: one ring.

    Attributes:
        rank, size: this rank among those that share a sequence, and their number.
        traffic: what this rank sent over all plans.

    Raises:
        ConfigError: an unknown strategy or layout, or a mesh that the strategy does not fit.
    """

    def __init__(
        self,
        mesh: AnyMesh = None,
        strategy: str = "ring",
        layout: str = "zigzag",
        timeout: float | None = None,
        inner_ring: int | None = None,
    ) -> None:
        if strategy not in STRATEGIES:
            raise ConfigError(f"context.strategy: {strategy}{nearest(strategy, STRATEGIES)}; {_listed(STRATEGIES)}")
        if layout not in LAYOUTS:
            raise ConfigError(f"context.layout: {layout}{nearest(layout, LAYOUTS)}; {_listed(LAYOUTS)}")
        self.strategy = strategy
        self.layout = layout
        self.inner_ring = inner_ring
        self.wires = wires(mesh, timeout)
        _check_fits(strategy, self.wires.ring.size, self.wires.ulysses.size)
        if inner_ring is not None:
            RingPath(self.wires.ring.size, inner_ring)
        self.rank, self.size = self.wires.all.rank, self.wires.all.size
        self.device = self.wires.all.device
        self.traffic = Traffic()
        self._geometries: dict[int, tuple[Geometry, Geometry]] = {}

    def plan(
        self,
        sequence_length: int,
        document_starts: Tensor | None = None,
        device: torch.device | None = None,
        dealing: Dealing | None = None,
    ) -> SequencePlan:
        """Deal the rows of a batch to the ranks.

        Args:
            sequence_length: rows of the whole sequence, S.
            document_starts: [B, S] int, the same on all ranks: for each row of the whole sequence the position at which
                its document begins. None: one document. Read on the host, so a CPU tensor spares a wait for the GPU.
            device: where ``positions`` and the local ``document_starts`` live. None: where document_starts is, or this
                rank's device.
            dealing: the positions of each rank of the ring, as ascending ranges with a stride of 1, in the place of the
                layout; shards may have any lengths.

        Raises:
            ConfigError: a sequence shorter than the pieces that the layout cuts.
            ValueError: document_starts of another shape, or not the starts of consecutive documents; a dealing that
                does not give every position to one rank.
        """
        documents = None if document_starts is None else documents_of(document_starts, sequence_length)
        if dealing is not None:
            if len(dealing) != self.wires.ring.size:
                raise ValueError(f"a dealing for {len(dealing)} ranks, and the ring has {self.wires.ring.size}")
            check_dealing(dealing, sequence_length)
            both = self._both_geometries(dealing)
        elif self.layout == "balanced" and documents is not None:
            both = self._both_geometries(chunks(self.layout, sequence_length, self.wires.ring.size, documents))
        else:
            both = self._kept_geometries(sequence_length)
        if device is None:
            device = self.device if document_starts is None else document_starts.device
        how = (self.wires, self.traffic, self.strategy, self.inner_ring)
        return SequencePlan(*how, *both, document_starts, documents, device)

    def _kept_geometries(self, sequence_length: int) -> tuple[Geometry, Geometry]:
        if sequence_length not in self._geometries:
            while len(self._geometries) >= _GEOMETRIES_KEPT:
                del self._geometries[next(iter(self._geometries))]
            dealt = chunks(self.layout, sequence_length, self.wires.ring.size)
            self._geometries[sequence_length] = self._both_geometries(dealt)
        return self._geometries[sequence_length]

    def _both_geometries(self, dealing: Dealing) -> tuple[Geometry, Geometry]:
        """Of the ring's ranks, and of all ranks that share the sequence."""
        ring = Geometry(dealing, self.wires.ring.rank)
        num_parts = self.wires.ulysses.size
        if num_parts == 1:
            return ring, ring
        if min(ring.lengths) < num_parts:
            raise ConfigError(
                f"context.ulysses_size {num_parts} ranks share {min(ring.lengths)} rows of a sequence of "
                f"{ring.sequence_length}; a sequence of {num_parts * len(dealing) * 2} or more works"
            )
        return ring, Geometry([part for held in dealing for part in cut(held, num_parts)], self.rank)


def _check_fits(strategy: str, ring: int, ulysses: int) -> None:
    """Refuse a mesh with ranks along a dimension that the strategy does not use."""
    total = ring * ulysses
    if strategy in ("ring", "all_gather") and ulysses > 1:
        wrong, works = f"the ring dimension only, and the ulysses dimension has {ulysses} ranks", f"{total} x 1"
    elif strategy == "ulysses" and ring > 1:
        wrong, works = f"the ulysses dimension only, and the ring dimension has {ring} ranks", f"1 x {total}"
    else:
        return
    raise ConfigError(
        f"context.strategy {strategy} uses {wrong}; a mesh of {works} (ring x ulysses), or hybrid on this one, works"
    )


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]} exist"
