"""Bytes of tensors alive, counted operator by operator: peak memory on a CPU, where no allocator keeps statistics.

Counted are storages that come into being while the mode is on, until their last holder (a variable, autograd's saved
tensors, a hook) lets go. What was there before is resident and counts nothing, so the peak is what a step needs on top
of parameters and gradients. Operators of ``hydra_dist`` written in Python, and operators that PyTorch composes of
others, are entered, so that their intermediate tensors count as well. Not counted is what one compiled operator
allocates and frees inside itself.
"""

import threading
import weakref
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OPENED_NAMESPACE = "hydra_dist"


class TensorMemory(TorchDispatchMode):
    """A context manager; ``peak_bytes``, ``alive_bytes`` and ``largest_elements`` say what was found.

    It sees the thread that entered it. Inside, backward runs on the calling thread too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive_bytes = 0
        """Of storages made since the mode was entered."""
        self.peak_bytes = 0
        self.largest_elements = 0
        """Elements of the largest storage made, in its tensor's dtype."""
        self.largest_made_by = ""
        """The operator that made it."""
        self.num_storages = 0
        self._sizes: dict[int, int] = {}
        # A storage may be released by another thread, or by a collection in the middle of our own bookkeeping.
        self._lock = threading.RLock()
        self._depth = 0
        self._backward_threads = True

    def __enter__(self) -> "TensorMemory":
        if self._depth == 0:
            self._backward_threads = torch.autograd.is_multithreading_enabled()
            torch.autograd.set_multithreading_enabled(False)
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._depth -= 1
        if self._depth == 0:
            torch.autograd.set_multithreading_enabled(self._backward_threads)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = self._call(func, args, kwargs)
        given = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if id(storage) not in given:
                self._count(storage, tensor.element_size(), str(func))
        return out

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func.namespace == OPENED_NAMESPACE:
            device = next(tensor.device.type for tensor in _tensors((args, kwargs)))
            keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.upper()))
            with self:
                return func.redispatch(keys, *args, **kwargs)
        with self:
            out = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if out is NotImplemented else out

    def _count(self, storage: torch.UntypedStorage, element_size: int, operator: str) -> None:
        key, size = id(storage), storage.nbytes()
        with self._lock:
            if key in self._sizes:
                return
            self._sizes[key] = size
            self.num_storages += 1
            self.alive_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.alive_bytes)
            if size // element_size > self.largest_elements:
                self.largest_elements, self.largest_made_by = size // element_size, operator
        weakref.finalize(storage, self._release, key).atexit = False

    def _release(self, key: int) -> None:
        with self._lock:
            self.alive_bytes -= self._sizes.pop(key)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.layout == torch.strided]
