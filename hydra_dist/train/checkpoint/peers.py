"""The ranks that save or load one checkpoint together, and how they share success or failure."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from hydra_dist.errors import UserError

T = TypeVar("T")


class Peers:
    """The ranks of a process group; a single one where torch.distributed is not in use."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        distributed = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank(group) if distributed else 0
        self.size: int = dist.get_world_size(group) if distributed else 1

    def share(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks. Collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def together(self, action: Callable[[], T]) -> list[T]:
        """Do something on every rank, and give each the results of all. Collective.

        Where any rank met an OSError or a mistake of the user's, every rank raises the first of them, so that none
        waits for another that has given up.
        """
        result: Any = None
        problem: Exception | None = None
        try:
            result = action()
        except (OSError, UserError) as error:
            problem = error
        outcomes = self.share((result, problem))
        for rank, (_, failure) in enumerate(outcomes):
            if isinstance(failure, OSError) and self.size > 1:
                raise OSError(failure.errno, f"{failure.strerror} (rank {rank})", failure.filename)
            if failure is not None:
                raise failure
        return [value for value, _ in outcomes]
