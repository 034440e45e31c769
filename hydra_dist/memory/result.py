"""What an estimate answers: bytes on one GPU, by component, between steps and in each phase of a step.

The bytes are those of live tensors (torch's ``memory_allocated``): neither the allocator's unused segments (reserved)
nor the CUDA context and the communication library (device) are in them. Peaks are of phases, never sums of everything:
what one phase frees the next may use.
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
