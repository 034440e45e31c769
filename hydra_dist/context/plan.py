"""One sequence over many ranks: what the model sees of it.

A ``ContextParallel`` is made once, from the ranks that share sequences. For each batch its ``plan`` says who holds
which rows, and the ``SequencePlan`` it returns does the two things in a layer that cross rows: attention, and the halo
before each chunk.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hydra_dist.attention.operator import check_inputs
from hydra_dist.context import sharding
from hydra_dist.context.geometry import Documents, Geometry, Schedules
from hydra_dist.context.halo import HaloExchange
from hydra_dist.context.handles import HANDLES
from hydra_dist.context.mesh import AnyMesh, transports
from hydra_dist.context.operator import Strategy
from hydra_dist.context.ring import Ring
from hydra_dist.context.single import Single
from hydra_dist.context.transport import Traffic
from hydra_dist.costs.layout import LAYOUTS
from hydra_dist.errors import ConfigError, nearest

STRATEGIES = ("ring",)
_GEOMETRIES_KEPT = 8


class ContextParallel:
    """The ranks that share a sequence, and how they do it.

    Args:
        mesh: a DeviceMesh with the dimensions ``ring`` and ``ulysses``, the mesh of an emulated rank, or None for one
            device. All ranks of a DeviceMesh make their ContextParallel at the same point of the program, once.
        strategy: ``ring``.
        layout: ``zigzag`` (balanced under a causal mask) or ``contiguous``.
        timeout: seconds that a rank waits for another one; None takes the process group's limit.

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
    ) -> None:
        if strategy not in STRATEGIES:
            raise ConfigError(f"context.strategy: {strategy}{nearest(strategy, STRATEGIES)}; {_exist(STRATEGIES)}")
        if layout not in LAYOUTS:
            raise ConfigError(f"context.layout: {layout}{nearest(layout, LAYOUTS)}; {_exist(LAYOUTS)}")
        self.strategy = strategy
        self.layout = layout
        self.ring, self.ulysses = transports(mesh, timeout)
        if self.ulysses.size > 1:
            raise ConfigError(
                f"context.strategy ring uses the ring dimension of the mesh only, and its ulysses dimension has "
                f"{self.ulysses.size} ranks; a mesh of {self.ring.size * self.ulysses.size} x 1 works"
            )
        self.rank, self.size = self.ring.rank, self.ring.size
        self.device = self.ring.device
        self.traffic = Traffic()
        self._geometries: dict[int, Geometry] = {}

    def plan(
        self, sequence_length: int, document_starts: Tensor | None = None, device: torch.device | None = None
    ) -> "SequencePlan":
        """Deal the rows of a batch to the ranks.

        Args:
            sequence_length: rows of the whole sequence, S.
            document_starts: [B, S] int, the same on all ranks: for each row of the whole sequence the position at which
                its document begins. None: one document. Read on the host, so a CPU tensor spares a wait for the GPU.
            device: where ``positions`` and the local ``document_starts`` live. None: where document_starts is, or this
                rank's device.

        Raises:
            ConfigError: a sequence shorter than the pieces that the layout cuts.
            ValueError: document_starts of another shape, or not the starts of consecutive documents.
        """
        if sequence_length not in self._geometries:
            while len(self._geometries) >= _GEOMETRIES_KEPT:
                del self._geometries[next(iter(self._geometries))]
            self._geometries[sequence_length] = Geometry(self.layout, sequence_length, self.rank, self.size)
        if device is None:
            device = self.device if document_starts is None else document_starts.device
        return SequencePlan(self, self._geometries[sequence_length], document_starts, device)


class SequencePlan:
    """One batch of sequences, seen from one rank.

    Attributes:
        positions: [S_local] int64, the global position of each local row.
        document_starts: [B, S_local], for each local row the global position at which its document begins; None for one
            document.
        ages: [B, S_local] int32, rows of its document before each local row; None for one document.
        chunk_lengths: rows of each local chunk; local rows are these chunks one after another, and consecutive
            positions within each.
    """

    def __init__(
        self, context: ContextParallel, geometry: Geometry, document_starts: Tensor | None, device: torch.device
    ) -> None:
        self.geometry = geometry
        self.sequence_length = geometry.sequence_length
        self.chunk_lengths = tuple(stop - start for start, stop in geometry.local_chunks)
        self.positions = geometry.positions(device)
        self.document_starts: Tensor | None = None
        self.ages: Tensor | None = None
        self._documents: Documents | None = None
        if document_starts is not None:
            self._documents = documents_of(document_starts, self.sequence_length)
            self.document_starts = sharding.shard(document_starts, 1, geometry).to(device)
            self.ages = (self.positions - self.document_starts).to(torch.int32)
        self._traffic = Traffic(parent=context.traffic)
        self._transport = context.ring.counting(self._traffic)
        self.strategy: Strategy
        if context.size == 1:
            self.strategy = Single(self.document_starts)
        else:
            self.strategy = Ring(self._transport, geometry.lengths, Schedules(geometry, self._documents))
        self.handle = HANDLES.add(self)

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
        return sharding.unshard(x_local, dim, self.geometry, self._transport)

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
            ConfigError: ``sparse`` is given, or a window below 1.
            ValueError: shapes or dtypes that do not fit together or with the plan; a negative logit_bound.
        """
        if sparse is not None:
            raise ConfigError("block-sparse attention over ranks does not exist; sparse=None (dense or window) works")
        if window is not None and window < 1:
            raise ConfigError(f"model.window {window}: a row sees at least itself; 1 or more, or none, works")
        check_inputs(q, k, v)
        self._check_rows("q", q)
        self._check_rows("k", k)
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
        return out

    def halo(self, parts: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
        """The rows before each local chunk, in one exchange for all tensors.

        Args:
            parts: (tensor [B, S_local, C], rows) pairs; dtypes, widths and rows may differ.

        Returns:
            For each pair [B, chunks, rows, C]; slot i of a chunk that starts at position s is position s - rows + i.
            Zero before the sequence and outside of the document of the chunk's first row. Differentiable once.
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

    def halo_exchange(self, rows: Sequence[int], device: torch.device) -> HaloExchange:
        """What moves the halos of tensors with these numbers of rows; for the operator."""
        maps = [self.geometry.halo_map(number, device) for number in rows]
        return HaloExchange(self._transport, maps, [self._inside(number, device) for number in rows])

    def stats(self) -> dict[str, dict[str, Any]]:
        """What this rank sent for this plan so far: bytes, messages and hops, by direction and kind."""
        return self._traffic.stats()

    def _inside(self, rows: int, device: torch.device) -> Tensor | None:
        """[B, chunks, rows] bool: the slots that lie in the document of the chunk's first row."""
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


def documents_of(document_starts: Tensor, sequence_length: int) -> Documents:
    """The sorted start positions of each batch row's documents.

    Raises:
        ValueError: not [B, S] integers, or not the starts of consecutive documents.
    """
    if document_starts.dim() != 2 or document_starts.shape[1] != sequence_length:
        raise ValueError(
            f"document_starts has shape {list(document_starts.shape)}; [batch, {sequence_length}] is wanted, over the "
            f"whole sequence"
        )
    if document_starts.dtype.is_floating_point or document_starts.dtype in (torch.bool, torch.complex64):
        raise ValueError(f"document_starts is {document_starts.dtype}; integers are wanted")
    host = document_starts.detach().cpu()
    begins = host == torch.arange(sequence_length)
    goes_on = torch.zeros_like(begins)
    goes_on[:, 1:] = host[:, 1:] == host[:, :-1]
    wrong = (~(begins | goes_on)).nonzero()
    if wrong.numel():
        batch, position = wrong[0].tolist()
        raise ValueError(
            f"document_starts[{batch}, {position}] is {int(host[batch, position])}; a row's document begins at the row "
            f"itself ({position}) or where that of the row before it begins, and at 0 for the first row"
        )
    return tuple(tuple(row.nonzero().flatten().tolist()) for row in begins)


def _exist(names: Sequence[str]) -> str:
    return f"{' and '.join(names)} exist{'s' if len(names) == 1 else ''}"
