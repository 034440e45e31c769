"""What an estimate answers: bytes on one GPU, by component, between steps and in each phase of a step.

Three metrics are kept apart: allocated is live tensors (torch's ``memory_allocated``), reserved what the allocator has
taken for them, device all that the driver counts, with the CUDA context and the communication library. Peaks are of
phases, never sums of everything: what one phase frees the next may use.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """One moment of a step, and what is alive at it beside what is kept between steps: bytes by component."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


BETWEEN_STEPS = "between steps"
"""The name of the phase that is no work at all: what a step leaves behind until the next one starts."""


@dataclass(frozen=True)
class RankMemory:
    """One GPU's allocated memory in training."""

    kept: Mapping[str, int]
    """All through training, from the second step on: bytes by component."""
    phases: tuple[Phase, ...]
    late: int
    """Of ``kept``, what comes only when the first step's peak has passed, the optimizer's moments above all: bytes."""

    @property
    def steady(self) -> int:
        """Allocated between steps, bytes."""
        return self._kept + sum(phase.total for phase in self.phases if phase.name == BETWEEN_STEPS)

    @property
    def limiting(self) -> Phase:
        """The phase that needs the most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        """The most that is ever allocated, bytes."""
        return self._kept + self.limiting.total

    @property
    def first_peak(self) -> int:
        """The most that is allocated until the end of the first step."""
        return max(self.peak - self.late, self.steady)

    @property
    def _kept(self) -> int:
        return sum(self.kept.values())


@dataclass(frozen=True)
class NodeMemory:
    """One GPU's memory by all three metrics, and what the host it stands in holds."""

    rank: RankMemory
    """Allocated."""
    reserved: int
    """The most that the allocator has taken from the GPU, bytes."""
    outside: Mapping[str, int]
    """On the GPU beside the allocator: bytes by component."""
    host: Mapping[str, int]
    """In the memory of one node, for all its ranks: bytes by component."""

    @property
    def allocated(self) -> int:
        return self.rank.peak

    @property
    def limiting(self) -> Phase:
        """The phase that needs the most."""
        return self.rank.limiting

    @property
    def device(self) -> int:
        """As NVML and nvidia-smi count, bytes."""
        return self.reserved + sum(self.outside.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())
