"""What follows from a dealing of rows for one rank: positions, spans, ring schedules and halo maps.

Nothing here depends on a batch, except schedules for its documents; a ``ContextParallel`` keeps one geometry for each
sequence length and hands it to its plans, where the dealing does not depend on documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hydra_dist.costs.halo import halo_sources, has_halo
from hydra_dist.costs.layout import Chunk, Dealing, lengths, offsets
from hydra_dist.costs.needs import MaskRule, Rows, Side
from hydra_dist.costs.rotation import Journey, RingPath, journeys
from hydra_dist.costs.tiles import Span, Tile, own_tiles, tiles

Documents = tuple[tuple[int, ...], ...]
"""For each batch row the sorted positions at which its documents start."""


@dataclass(frozen=True)
class RingSchedule:
    """What one rank computes at each hop of a ring, and how far the rows of each rank travel.

    Attributes:
        path: in which order ranks are visited.
        journeys: of the rows of each rank.
        tiles: tiles[t] are those between this rank's rows and the rows that visit at hop t; tiles[0] its own.
    """

    path: RingPath
    journeys: tuple[Journey, ...]
    tiles: tuple[tuple[Tile, ...], ...]


@dataclass(frozen=True)
class HaloMap:
    """Which rows make up the halo, by peer, as index tensors. This rank is a peer too; one without rows is missing.

    Attributes:
        rows: before each chunk.
        give: for each peer, the places in ``touched`` of the rows that it needs.
        take: for each peer, the slots (chunk * rows + slot) that its rows fill, in the order in which it gives them.
        touched: this rank's rows that some rank needs, each once.
    """

    rows: int
    give: dict[int, Tensor]
    take: dict[int, Tensor]
    touched: Tensor


class Geometry:
    """The rows of one rank.

    Attributes:
        dealing: the chunks of every rank, in ascending order.
        lengths: rows of every rank.
        sequence_length: of the whole sequence.
        rank: this one.
        kept: what others worked out from it, for masks that do not depend on a batch.
    """

    def __init__(self, dealing: Dealing, rank: int) -> None:
        self.dealing = dealing
        self.rank = rank
        self.lengths = lengths(dealing)
        self.sequence_length = sum(self.lengths)
        self._halo_maps: dict[tuple[int, torch.device], HaloMap] = {}
        self._positions: dict[torch.device, Tensor] = {}
        self.kept: dict[Any, Any] = {}

    @property
    def local_chunks(self) -> list[Chunk]:
        return self.dealing[self.rank]

    @property
    def local_length(self) -> int:
        return self.lengths[self.rank]

    @property
    def has_halo(self) -> bool:
        """Whether chunks are runs of consecutive positions."""
        return all(map(has_halo, self.dealing))

    def positions(self, device: torch.device) -> Tensor:
        """Global positions of this rank's rows, [S_local] int64."""
        if device not in self._positions:
            parts = [torch.arange(chunk.start, chunk.stop, chunk.step, device=device) for chunk in self.local_chunks]
            self._positions[device] = torch.cat(parts)
        return self._positions[device]

    def spans(self, rank: int, rows: Rows | None = None) -> list[Span]:
        """The positions that rows of a rank hold, counted as if these rows lay side by side; None: all of its rows."""
        held, count = self.dealing[rank], 0
        spans = []
        for part in (range(self.lengths[rank]),) if rows is None else rows:
            for chunk, offset in zip(held, offsets(held), strict=True):
                own = chunk[max(0, part.start - offset) : max(0, part.stop - offset)]
                if len(own):
                    spans.append(Span(count, count + len(own), own.start, chunk.step))
                    count += len(own)
        return spans

    def schedule(self, mask: MaskRule, side: Side, inner: int | None) -> RingSchedule:
        """The ring of this rank for a mask; ``side`` is what goes around, queries the other way round."""
        num_ranks = len(self.dealing)
        path = RingPath(num_ranks, inner, reverse=side == "queries")
        ways = journeys(self.dealing, mask, path, side)
        mine = self.spans(self.rank)
        found: list[tuple[Tile, ...]] = []
        for hop in range(num_ranks):
            owner = path.owner(self.rank, hop)
            if hop == 0:
                found.append(own_tiles(mine, causal=mask.causal, window=mask.window, documents=mask.documents))
                continue
            visitor = self.spans(owner, ways[owner].rows) if ways[owner].last >= hop else []
            queries, keys = (mine, visitor) if side == "keys" else (visitor, mine)
            found.append(tiles(queries, keys, causal=mask.causal, window=mask.window, documents=mask.documents))
        return RingSchedule(path, ways, tuple(found))

    def halo_map(self, rows: int, device: torch.device) -> HaloMap:
        """The halo of ``rows`` rows before each chunk."""
        if (rows, device) not in self._halo_maps:
            self._halo_maps[rows, device] = self._halo_map(rows, device)
        return self._halo_maps[rows, device]

    def _halo_map(self, rows: int, device: torch.device) -> HaloMap:
        sources = halo_sources(self.dealing, rows)
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
            rows=rows,
            give={peer: _index([place[row] for row in local], device) for peer, local in given.items()},
            take={peer: _index(slots, device) for peer, slots in sorted(taken.items())},
            touched=_index(touched, device),
        )


def _index(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
