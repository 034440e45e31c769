"""One batch of sequences over many ranks: what the model sees of it.

A ``SequencePlan`` knows which rows this rank holds, and does the two things in a layer that cross rows: attention, and
the halo before each chunk.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hydra_dist.attention.operator import check_inputs
from hydra_dist.context import sharding
from hydra_dist.context.gather import AllGather
from hydra_dist.context.geometry import Documents, Geometry
from hydra_dist.context.halo import HaloExchange
from hydra_dist.context.handles import HANDLES
from hydra_dist.context.mesh import Wires
from hydra_dist.context.operator import Strategy
from hydra_dist.context.ring import Ring
from hydra_dist.context.schedules import Schedules
from hydra_dist.context.single import Single
from hydra_dist.context.transport import Traffic
from hydra_dist.context.ulysses import HeadExchange
from hydra_dist.costs.ulysses import key_heads_per_rank
from hydra_dist.errors import ConfigError


class SequencePlan:
    """One batch of sequences, seen from one rank.

    Attributes:
        positions: [S_local] int64, the global position of each local row.
        document_starts: [B, S_local], for each local row the global position at which its document begins; None for one
            document.
        ages: [B, S_local] int32, rows of its document before each local row; None for one document.
        chunk_lengths: rows of each local chunk; local rows are these chunks one after another, and consecutive
            positions within each (every P-th in a striped layout).
    """

    def __init__(
        self,
        wires: Wires,
        traffic: Traffic,
        strategy: str,
        inner_ring: int | None,
        ring: Geometry,
        geometry: Geometry,
        document_starts: Tensor | None,
        documents: Documents | None,
        device: torch.device,
    ) -> None:
        self.geometry = geometry
        self.sequence_length = geometry.sequence_length
        self.chunk_lengths = tuple(map(len, geometry.local_chunks))
        self.positions = geometry.positions(device)
        self.document_starts: Tensor | None = None
        self.ages: Tensor | None = None
        self._documents = documents
        self._known_inside: dict[tuple[int, torch.device], Tensor | None] = {}
        if document_starts is not None:
            self.document_starts = sharding.shard(document_starts, 1, geometry).to(device)
            self.ages = (self.positions - self.document_starts).to(torch.int32)
        self._traffic = Traffic(parent=traffic)
        self._wires = wires.counting(self._traffic)
        first = ring.rank * self._wires.ulysses.size
        self.heads = HeadExchange(self._wires.ulysses, geometry.lengths[first : first + self._wires.ulysses.size])
        self.strategy = self._strategy(strategy, inner_ring, ring, document_starts)
        self.handle = HANDLES.add(self)

    def _strategy(self, name: str, inner_ring: int | None, ring: Geometry, document_starts: Tensor | None) -> Strategy:
        """How the ranks of the ring attend over each other's rows."""
        if self._wires.ring.size == 1:
            return Single(document_starts)
        schedules = Schedules(ring, self._documents, inner_ring)
        if name == "all_gather":
            return AllGather(self._wires.ring, schedules.gathering, self.sequence_length)
        return Ring(self._wires.ring, schedules.ring)

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's rows of a whole tensor along ``dim``. Differentiable: the gradient of a whole tensor is this
        rank's share, zero in the rows of other ranks."""
        if x.shape[dim] != self.sequence_length:
            raise ValueError(f"dimension {dim} of {list(x.shape)} holds all rows; it must have {self.sequence_length}")
        return sharding.shard(x, dim, self.geometry)

    def unshard(self, x_local: Tensor, dim: int) -> Tensor:
        """The whole tensor, on every rank, from each rank's rows. Differentiable for an objective that is the sum of
        what the ranks call backward on; where all of them compute the same loss, divide it by their number."""
        if x_local.shape[dim] != self.geometry.local_length:
            raise ValueError(
                f"dimension {dim} of {list(x_local.shape)} holds local rows; it must have {self.geometry.local_length}"
            )
        return sharding.unshard(x_local, dim, self.geometry, self._wires.all)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = True,
        window: int | None = None,
        scale: float | None = None,
        sparse: Any = None,
        logit_bound: float | None = None,
    ) -> Tensor:
        """Attention of the local queries over the keys of all ranks, within documents.

        Args:
            q: [B, S_local, Hq, D].
            k, v: [B, S_local, Hk, D]; Hq is a multiple of Hk.
            causal: a query sees its own and earlier positions.
            window: a query sees itself and the window - 1 positions before it (tokens); None for all.
            scale: factor on the scores. None: 1 / sqrt(D).
            sparse: must be None.
            logit_bound: a promise that |scale q k| never passes it, in q's and k's dtype; None promises nothing. Up to
                ``hydra_dist.attention.LARGEST_LOGIT_BOUND`` partial results are merged by plain addition: the same
                numbers up to rounding, and NaN or infinite ones where a broken promise would make them wrong.

        Returns:
            [B, S_local, Hq, D] in q's dtype. Differentiable once. The gradients of k and v include what all ranks'
            queries add.

        Raises:
            ConfigError: ``sparse`` is given, a window below 1, or heads that a Ulysses group cannot share.
            ValueError: shapes or dtypes that do not fit together or with the plan; a negative logit_bound.
        """
        if sparse is not None:
            raise ConfigError("block-sparse attention over ranks does not exist; sparse=None (dense or window) works")
        if window is not None and window < 1:
            raise ConfigError(f"model.window {window}: a row sees at least itself; 1 or more, or none, works")
        check_inputs(q, k, v)
        self._check_rows("q", q)
        self._check_rows("k", k)
        num_heads, num_ranks = q.shape[2], self._wires.ulysses.size
        if num_ranks > 1:
            key_heads_per_rank(num_heads, k.shape[2], num_ranks)
            num_rows = sum(self.heads.lengths)
            q, k, v = torch.ops.hydra_dist.rows_to_heads([q, k, v], self.handle, num_rows, num_ranks, False)
        out, _ = torch.ops.hydra_dist.context_attention(
            q,
            k,
            v,
            self.handle,
            causal,
            -1 if window is None else window,
            1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale),
            logit_bound,
        )
        if num_ranks > 1:
            local = self.geometry.local_length
            (out,) = torch.ops.hydra_dist.heads_to_rows([out], self.handle, [num_heads], local, False)
        return out

    def halo(self, parts: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
        """The rows before each local chunk, in one exchange for all tensors.

        Args:
            parts: (tensor [B, S_local, C], rows) pairs; dtypes, widths and rows may differ.

        Returns:
            For each pair [B, chunks, rows, C]; slot i of a chunk that starts at position s is position s - rows + i.
            Zero before the sequence and outside of the document of the chunk's first row. Differentiable once.

        Raises:
            ConfigError: a striped layout, where the row before each row is on another rank.
        """
        if not parts:
            return []
        num_chunks = len(self.chunk_lengths)
        for tensor, number in parts:
            if tensor.dim() != 3:
                raise ValueError(f"a halo takes tensors [batch, rows, channels]; this one is {list(tensor.shape)}")
            if number < 0:
                raise ValueError(f"a halo of {number} rows was asked for; 0 or more is possible")
            self._check_rows("a halo's tensor", tensor)
        tensors, rows = zip(*parts, strict=True)
        halos: list[Tensor] = torch.ops.hydra_dist.halo(list(tensors), self.handle, list(rows), num_chunks)
        return halos

    @property
    def halo_handle(self) -> int | None:
        """Names this plan for an operator that fetches its own halo and works meanwhile; None where one rank holds all
        rows and there is nothing to wait for."""
        return None if self._wires.all.size == 1 else self.handle

    def halo_exchange(self, rows: Sequence[int], device: torch.device) -> HaloExchange:
        """What moves the halos of tensors with these numbers of rows; for operators."""
        if not self.geometry.has_halo:
            raise ConfigError(
                "context.layout striped: convolutions and the value shift read the row before each row, which another "
                "rank then holds; zigzag, contiguous or balanced works"
            )
        maps = [self.geometry.halo_map(number, device) for number in rows]
        return HaloExchange(self._wires.all, maps, [self._inside(number, device) for number in rows])

    def stats(self) -> dict[str, dict[str, Any]]:
        """What this rank sent for this plan so far: bytes, messages and hops, by direction and kind."""
        return self._traffic.stats()

    def _inside(self, rows: int, device: torch.device) -> Tensor | None:
        """[B, chunks, rows] bool: the slots that lie in the document of the chunk's first row."""
        if (rows, device) not in self._known_inside:
            self._known_inside[rows, device] = self._find_inside(rows, device)
        return self._known_inside[rows, device]

    def _find_inside(self, rows: int, device: torch.device) -> Tensor | None:
        if self._documents is None or self.document_starts is None:
            return None
        first_rows = torch.tensor([0, *self.chunk_lengths[:-1]], device=self.document_starts.device).cumsum(0)
        starts = self.document_starts.index_select(1, first_rows).to(device)
        chunk_starts = self.positions.index_select(0, first_rows.to(self.positions.device)).to(device)
        slots = chunk_starts[:, None] - rows + torch.arange(rows, device=device)
        return slots >= starts[:, :, None]

    def _check_rows(self, name: str, x: Tensor) -> None:
        if x.shape[1] != self.geometry.local_length:
            raise ValueError(
                f"{name} has {x.shape[1]} rows and this rank holds {self.geometry.local_length} of "
                f"{self.sequence_length}"
            )
        if self.document_starts is not None and x.shape[0] != self.document_starts.shape[0]:
            raise ValueError(
                f"{name} has {x.shape[0]} batch rows and document_starts has {self.document_starts.shape[0]}"
            )
