"""Names for the plans of batches, which operators take instead of the plans themselves.

An operator's arguments are tensors and plain values. The table of handles does not keep a plan alive; a plan lives as
long as its owner, or a backward pass that is still to come, holds it.
"""

import itertools
import threading
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Named(Protocol):
    """What a handle names: a plan, as the operators know it."""

    strategy: Any
    """See ``operator.Strategy``."""
    heads: Any
    """See ``ulysses.HeadExchange``."""

    def halo_exchange(self, rows: Sequence[int], device: torch.device) -> Any:
        """A ``HaloExchange`` of tensors with these numbers of rows."""


class Handles:
    """Numbers that name living plans. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._plans: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def add(self, plan: Named) -> int:
        with self._lock:
            handle = next(self._numbers)
            self._plans[handle] = plan
            return handle

    def get(self, handle: int) -> Named:
        with self._lock:
            plan = self._plans.get(handle)
        if plan is None:
            raise RuntimeError(
                f"plan {handle} of a context-parallel sequence no longer exists; keep what ContextParallel.plan() "
                f"returned until the backward pass is over"
            )
        return plan


def kept_alive(handle: int) -> Named | None:
    """The plan that a backward pass has to hold; None while code is traced, where the handle is a symbol.

    Compiled code keeps the number alone, so whoever calls it holds the plan until backward is over.
    """
    return HANDLES.get(handle) if isinstance(handle, int) else None


HANDLES = Handles()
