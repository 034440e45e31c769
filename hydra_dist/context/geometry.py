"""What follows from a layout and a sequence length for one rank: rows, spans, ring schedules and halo maps.

Nothing here depends on a batch, except schedules for its documents; a ``ContextParallel`` keeps one geometry for each
sequence length and hands it to its plans.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_dist.costs.layout import Chunk, Journey, chunks, halo_sources, lengths, ring_journeys
from hydra_dist.costs.tiles import Span, Tile, tiles

Documents = tuple[tuple[int, ...], ...]
"""For each batch row the sorted positions at which its documents start."""


@dataclass(frozen=True)
class RingSchedule:
    """What one rank computes at each hop of a ring, and how far the keys of each rank travel.

    Attributes:
        tiles: tiles[t] are the tiles of this rank's queries over the keys of rank - t.
        journeys: the hops that the keys of each rank make.
    """

    tiles: tuple[tuple[Tile, ...], ...]
    journeys: tuple[Journey, ...]


@dataclass(frozen=True)
class HaloMap:
    """Which rows make up the halo, by peer, as index tensors. This rank is a peer too; one without rows is missing.

    Attributes:
        give: for each peer, the places in ``touched`` of the rows that it needs.
        take: for each peer, the slots (chunk * rows + slot) that its rows fill, in the order in which it gives them.
        touched: this rank's rows that some rank needs, each once.
    """

    give: dict[int, Tensor]
    take: dict[int, Tensor]
    touched: Tensor


class Schedules:
    """Ring schedules by mask, for the documents of one batch. Each is worked out at its first use.

    Schedules without documents do not depend on a batch and are kept with the geometry.
    """

    def __init__(self, geometry: "Geometry", documents: Documents | None) -> None:
        self._geometry = geometry
        self._documents = documents
        self._known = geometry.dense_schedules if documents is None else {}

    def __call__(self, causal: bool, window: int | None) -> RingSchedule:
        if (causal, window) not in self._known:
            self._known[causal, window] = self._geometry.schedule(causal, window, self._documents)
        return self._known[causal, window]


class Geometry:
    """The rows of one rank.

    Attributes:
        chunks: of every rank, in ascending order.
        lengths: rows of every rank.
        rank: this one.
        dense_schedules: those of one document, by (causal, window).
    """

    def __init__(self, layout: str, sequence_length: int, rank: int, num_ranks: int) -> None:
        self.sequence_length = sequence_length
        self.rank = rank
        self.chunks: list[list[Chunk]] = chunks(layout, sequence_length, num_ranks)
        self.lengths = lengths(self.chunks)
        self._halo_maps: dict[tuple[int, torch.device], HaloMap] = {}
        self._positions: dict[torch.device, Tensor] = {}
        self.dense_schedules: dict[tuple[bool, int | None], RingSchedule] = {}

    @property
    def local_chunks(self) -> list[Chunk]:
        return self.chunks[self.rank]

    @property
    def local_length(self) -> int:
        return self.lengths[self.rank]

    def positions(self, device: torch.device) -> Tensor:
        """Global positions of this rank's rows, [S_local] int64."""
        if device not in self._positions:
            parts = [torch.arange(start, stop, device=device) for start, stop in self.local_chunks]
            self._positions[device] = torch.cat(parts)
        return self._positions[device]

    def spans(self, rank: int) -> list[Span]:
        """The rows of a rank and the positions they hold."""
        spans, row = [], 0
        for start, stop in self.chunks[rank]:
            spans.append(Span(row, row + stop - start, start))
            row += stop - start
        return spans

    def schedule(self, causal: bool, window: int | None, documents: Documents | None) -> RingSchedule:
        """The ring of this rank for a mask."""
        num_ranks = len(self.chunks)
        q_spans = self.spans(self.rank)
        journeys = ring_journeys(self.chunks, causal=causal, window=window, documents=documents)
        found: list[tuple[Tile, ...]] = []
        for hop in range(num_ranks):
            owner = (self.rank - hop) % num_ranks
            arrives = journeys[owner].last >= hop
            k_spans = self.spans(owner)
            found.append(tiles(q_spans, k_spans, causal=causal, window=window, documents=documents) if arrives else ())
        return RingSchedule(tuple(found), journeys)

    def halo_map(self, rows: int, device: torch.device) -> HaloMap:
        """The halo of ``rows`` rows before each chunk."""
        if (rows, device) not in self._halo_maps:
            self._halo_maps[rows, device] = self._halo_map(rows, device)
        return self._halo_maps[rows, device]

    def _halo_map(self, rows: int, device: torch.device) -> HaloMap:
        sources = halo_sources(self.chunks, rows)
        given: dict[int, list[int]] = {}
        for peer, runs in enumerate(sources):
            local = [row for run in runs if run.owner == self.rank for row in range(run.row, run.row + run.length)]
            if local:
                given[peer] = local
        taken: dict[int, list[int]] = {}
        for run in sources[self.rank]:
            first = run.chunk * rows + run.slot
            taken.setdefault(run.owner, []).extend(range(first, first + run.length))
        touched = sorted({row for local in given.values() for row in local})
        place = {row: index for index, row in enumerate(touched)}
        return HaloMap(
            give={peer: _index([place[row] for row in local], device) for peer, local in given.items()},
            take={peer: _index(slots, device) for peer, slots in sorted(taken.items())},
            touched=_index(touched, device),
        )


def _index(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
