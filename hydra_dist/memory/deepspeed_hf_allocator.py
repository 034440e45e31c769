"""The caching allocator of torch under ``expandable_segments``, replayed: live bytes, and how far its segment grows.

A peak of live tensors (allocated) follows from sizes and lifetimes alone; how much the allocator has taken from the GPU
for them (reserved) depends on the order as well, for what is freed leaves holes, and a tensor that fits no hole makes
the segment longer. Both are found by playing the allocations of a step in the order of the code.

What is allocated under different streams shares no memory: every stream has a segment.

Source: torch's CUDACachingAllocator.cpp: best fit by size, then by address; neighbours that are free are joined; an
expandable segment grows at its end, by whole pages; a block that another stream was told to use (``record_stream``) is
free when that stream has passed, while the host, which allocates, runs ahead until it synchronizes.
"""

from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass, replace

PAGE = 20 * 2**20
"""By which an expandable segment of large blocks grows."""
ROUND = 512
"""Blocks are multiples of this."""


@dataclass(frozen=True)
class Peak:
    """The most that was live in one phase, and of what: bytes by component."""

    phase: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class _Segment:
    """Addresses of one stream: what is free before the end, and the longest it has been."""

    def __init__(self) -> None:
        self.longest = 0
        self._end = 0
        self._holes: list[tuple[int, int]] = []
        """Size and start, sorted."""

    def place(self, size: int) -> int:
        for index, (hole, start) in enumerate(self._holes):
            if hole >= size:
                del self._holes[index]
                if hole > size:
                    insort(self._holes, (hole - size, start + size))
                return start
        start = self._end
        self._end += size
        self.longest = max(self.longest, -(-self._end // PAGE) * PAGE)
        return start

    def release(self, start: int, size: int) -> None:
        for hole in [hole for hole in self._holes if sum(hole) == start or hole[1] == start + size]:
            self._holes.remove(hole)
            start, size = min(start, hole[1]), size + hole[0]
        if start + size == self._end:
            self._end = start
        else:
            insort(self._holes, (size, start))


@dataclass(frozen=True)
class _Block:
    start: int
    size: int
    component: str
    stream: str


class Allocator:
    """The memory of one GPU. Tensors go by name; a name may be used again once its tensor is freed."""

    def __init__(self) -> None:
        self.live: dict[str, int] = {}
        """Bytes by component."""
        self.total = 0
        self.peaks: dict[str, Peak] = {}
        """By phase."""
        self._phase = ""
        self._most = -1
        self._blocks: dict[str, _Block] = {}
        self._waiting: list[_Block] = []
        self._segments: dict[str, _Segment] = {}

    @property
    def reserved(self) -> int:
        """Bytes of all segments, each at its longest."""
        return sum(segment.longest for segment in self._segments.values())

    def phase(self, name: str) -> None:
        """What follows belongs to phase ``name``."""
        self._phase, self._most = name, -1
        self._note()

    def allocate(self, name: str, size: int, component: str, stream: str = "compute") -> None:
        """Raises ValueError for a name that is there."""
        if name in self._blocks:
            raise ValueError(f"{name} is allocated twice")
        size = -(-size // ROUND) * ROUND
        start = self._segments.setdefault(stream, _Segment()).place(size) if size else 0
        self._blocks[name] = _Block(start, size, component, stream)
        self._count(component, size)
        self._note()

    def free(self, *names: str, late: bool = False) -> None:
        """``late``: another stream reads the tensor, so that its memory waits for the next ``synchronize``."""
        for name in names:
            block = self._blocks.pop(name)
            self._count(block.component, -block.size)
            if block.size and late:
                self._waiting.append(block)
            elif block.size:
                self._segments[block.stream].release(block.start, block.size)

    def synchronize(self) -> None:
        """The host has waited for the GPU: what other streams read is free."""
        for block in self._waiting:
            self._segments[block.stream].release(block.start, block.size)
        self._waiting.clear()

    def holds(self, name: str) -> bool:
        return name in self._blocks

    def rename(self, old: str, new: str, component: str | None = None) -> None:
        """The tensor ``old`` is called ``new`` from here on, and counts as ``component``."""
        if new in self._blocks:
            raise ValueError(f"{new} is there already")
        block = self._blocks.pop(old)
        if component is not None:
            self._count(block.component, -block.size)
            self._count(component, block.size)
            block = replace(block, component=component)
        self._blocks[new] = block

    def _count(self, component: str, size: int) -> None:
        self.live[component] = self.live.get(component, 0) + size
        self.total += size

    def _note(self) -> None:
        if self.total > self._most:
            self._most = self.total
            parts = {component: size for component, size in self.live.items() if size}
            self.peaks[self._phase] = Peak(self._phase, parts)
