"""What a rank does under a mask, worked out at its first use and kept.

Schedules without documents do not depend on a batch and are kept with the geometry.
"""

from typing import Any

from hydra_dist.context.gather import Gathering, gathering
from hydra_dist.context.geometry import Documents, Geometry, RingSchedule
from hydra_dist.costs.needs import MaskRule, Side


class Schedules:
    """Of one rank, for the documents of one batch.

    Args:
        geometry: of the ranks of the ring.
        documents: of the batch; None: one document.
        inner_ring: ranks of a node, for a ring of rings.
    """

    def __init__(self, geometry: Geometry, documents: Documents | None, inner_ring: int | None) -> None:
        self._geometry, self._documents, self._inner = geometry, documents, inner_ring
        self._known: dict[Any, Any] = geometry.kept if documents is None else {}

    def ring(self, causal: bool, window: int | None, side: Side) -> RingSchedule:
        """The ring with ``side`` going around."""
        key = ("ring", causal, window, side, self._inner)
        if key not in self._known:
            self._known[key] = self._geometry.schedule(self._mask(causal, window), side, self._inner)
        schedule: RingSchedule = self._known[key]
        return schedule

    def gathering(self, causal: bool, window: int | None) -> Gathering:
        """What is gathered."""
        key = ("gathering", causal, window)
        if key not in self._known:
            geometry = self._geometry
            spans = geometry.spans(geometry.rank)
            self._known[key] = gathering(geometry.dealing, geometry.rank, self._mask(causal, window), spans)
        found: Gathering = self._known[key]
        return found

    def _mask(self, causal: bool, window: int | None) -> MaskRule:
        return MaskRule(causal, window, self._documents)
