"""What checkpointed layers keep, moved to host memory between forward and backward, beside the computation.

A checkpointed layer keeps its input and its attention result. In forward each is copied to the host as soon as it is
there, while the layer computes; its device memory is given back when the next layer is done. In backward a layer's
tensors begin their way back when the layer above it begins, so that they arrive while that one computes. At most two
layers' tensors are on the device at a time. The last layer's stay there: backward begins with them.

The device's memory is held until the copy out of it is over, and all of it belongs to the stream that computes, which
waits for the copies: the allocator needs no record of a second stream, and can give memory back at once.

Source: the order of the copies is that of Rhu et al. 2016 (vDNN, arXiv 1602.08124); that checkpoints are what is worth
moving, Jacobs et al. 2025 (ALST, arXiv 2506.13996).
"""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from hydra_dist.errors import ConfigError

SMALLEST = 1 << 20
"""Bytes below which a tensor is left on the device: a copy would cost more than its memory is worth."""


class Host(Protocol):
    """Memory beside the device, and a queue of copies to and from it that are done in the order they were asked for."""

    def allocate(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8 in host memory."""

    def send(self, source: Tensor, buffer: Tensor) -> Any:
        """Copy ``source`` into the beginning of ``buffer``; a mark to wait for."""

    def fetch(self, buffer: Tensor, shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Any]:
        """A device tensor that ``buffer``'s beginning is copied into, and a mark to wait for before it is read."""

    def wait(self, mark: Any) -> None:
        """The computation goes on after the copy, without stopping this thread."""

    def finish(self, mark: Any) -> None:
        """Stop this thread until the copy is over."""


class PinnedHost:
    """Pinned host memory, and a stream of its own on one GPU for the copies.

    PyTorch rounds a pinned buffer up to a power of two bytes. Raises ConfigError for a device that is no GPU.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ConfigError(
                f"train.activation_offload true: this run is on a {device.type} device, whose memory is the host's "
                "already; train.activation_offload=false works"
            )
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def send(self, source: Tensor, buffer: Tensor) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            _seen_as(buffer, source.shape, source.dtype).copy_(source, non_blocking=True)
            return self._stream.record_event()

    def fetch(self, buffer: Tensor, shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, torch.cuda.Event]:
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        # Whoever had this memory before is done with it where the computation stands now.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            tensor.copy_(_seen_as(buffer, shape, dtype), non_blocking=True)
            return tensor, self._stream.record_event()

    def wait(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)

    def finish(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()


def _seen_as(buffer: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return buffer[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


class ActivationOffload:
    """Keeps the tensors of a model's checkpointed layers on ``host``, in buffers that it uses again in later steps.

    Args:
        host: where to.
        operators: those whose results a layer keeps, beside its input.
        smallest: bytes from which on a tensor is moved.
    """

    def __init__(self, host: Host, operators: Sequence[Any], smallest: int = SMALLEST) -> None:
        self.host = host
        self.operators = frozenset(operators)
        self.smallest = smallest
        self.free: list[Tensor] = []
        """Buffers that nobody uses now."""

    @contextmanager
    def forward(self, num_layers: int) -> Iterator["Forward"]:
        """Around one forward over ``num_layers`` layers."""
        run = Forward(self, num_layers)
        try:
            yield run
            run.settle(0)
        finally:
            run.under_way.clear()

    def take_buffer(self, num_bytes: int) -> Tensor:
        """The smallest free buffer that is large enough, or a new one in the place of the largest free one."""
        self.free.sort(key=len)
        for index, buffer in enumerate(self.free):
            if len(buffer) >= num_bytes:
                return self.free.pop(index)
        if self.free:
            self.free.pop()
        return self.host.allocate(num_bytes)


class Forward:
    """The layers of one forward, of which the newest two may still be on their way to the host."""

    def __init__(self, offload: ActivationOffload, num_layers: int) -> None:
        self.offload = offload
        self.num_layers = num_layers
        self.count = 0
        self.under_way: list[Layer] = []
        self._newest: Layer | None = None

    @contextmanager
    def layer(self, x: Tensor) -> Iterator[Callable[[], tuple[TorchDispatchMode, TorchDispatchMode]]]:
        """Around the checkpointed forward of the next layer, whose input is ``x``; yields its ``context_fn``."""
        self.settle(1)
        self.count += 1
        layer = Layer(self.offload, self._newest, moves=self.count < self.num_layers)
        self._newest = layer
        self.under_way.append(layer)
        address = x.data_ptr()  # and not x, which the hooks would hold as long as the graph

        def pack(tensor: Tensor) -> Any:
            return layer.keep(tensor) if tensor.data_ptr() == address else tensor

        def unpack(kept: Any) -> Tensor:
            return kept if isinstance(kept, Tensor) else layer.take(kept)

        with saved_tensors_hooks(pack, unpack):
            yield lambda: (_Keep(layer), _Return(layer))

    def settle(self, newest: int) -> None:
        """Give back the device memory of all layers but the ``newest``, after their copies."""
        while len(self.under_way) > newest:
            self.under_way.pop(0).settle()


class _Piece:
    """One tensor of a layer: on the device, on its way, or on the host."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.tensor: Tensor | None = tensor
        self.version = tensor._version
        self.buffer: Tensor | None = None
        self.mark: Any = None
        """Of the copy under way, None where there is none."""

    def check(self) -> None:
        """RuntimeError where the device tensor is no longer what was to be kept."""
        if self.tensor is not None and self.tensor._version != self.version:
            raise RuntimeError(
                "a layer's input or attention result has been changed in place, and activation offload kept it for "
                "backward; compute the change out of place"
            )


class Layer:
    """What one layer keeps, and the layer below it, whose tensors it calls back before it needs its own."""

    def __init__(self, offload: ActivationOffload, below: "Layer | None", moves: bool) -> None:
        self.offload = offload
        self.below = below
        self.moves = moves
        self.pieces: list[_Piece] = []
        self.results: list[tuple[Any, Any, list[int]]] = []
        """For each call of an operator: the operator, the form of its result, and which pieces that is made of."""
        self._called_back = False
        weakref.finalize(self, _abandon, offload, self.pieces).atexit = False

    def keep(self, tensor: Tensor) -> int:
        """Begin to move ``tensor``; the number under which it comes back."""
        tensor = tensor.detach()
        piece = _Piece(tensor)
        num_bytes = tensor.numel() * tensor.element_size()
        if self.moves and num_bytes >= self.offload.smallest:
            piece.buffer = self.offload.take_buffer(num_bytes)
            piece.mark = self.offload.host.send(tensor, piece.buffer)
        self.pieces.append(piece)
        return len(self.pieces) - 1

    def settle(self) -> None:
        """Let go of the device tensors whose contents the host has."""
        for piece in self.pieces:
            if piece.buffer is None or piece.tensor is None:
                continue
            piece.check()
            self.offload.host.wait(piece.mark)
            piece.tensor = piece.mark = None

    def call_back(self) -> None:
        """Begin to bring everything back, once."""
        if not self._called_back:
            self._called_back = True
            for piece in self.pieces:
                self._fetch(piece)

    def take(self, index: int) -> Tensor:
        """Piece ``index``, for the computation to read. The layer below is called back behind it."""
        self.call_back()
        if self.below is not None:
            self.below.call_back()
            self.below = None
        piece = self.pieces[index]
        self._fetch(piece)  # anew, where a graph that is kept is gone through a second time
        tensor = piece.tensor
        assert tensor is not None
        if piece.buffer is None:
            piece.check()
        if piece.mark is not None:
            self.offload.host.wait(piece.mark)
            piece.tensor = piece.mark = None  # the graph holds it now, and no longer than it needs it
        return tensor

    def _fetch(self, piece: _Piece) -> None:
        if piece.tensor is None and piece.buffer is not None:
            piece.tensor, piece.mark = self.offload.host.fetch(piece.buffer, piece.shape, piece.dtype)


def _abandon(offload: ActivationOffload, pieces: list[_Piece]) -> None:
    """The graph is gone, used or not: no copy may outlive the memory that it reads and writes."""
    for piece in pieces:
        if piece.mark is not None:
            offload.host.finish(piece.mark)
        if piece.buffer is not None:
            offload.free.append(piece.buffer)


class _Keep(TorchDispatchMode):
    """Forward: what the layer's operators return is kept."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in self.layer.offload.operators:
            tensors, form = tree_flatten(out)
            self.layer.results.append((func, form, [self.layer.keep(tensor) for tensor in tensors]))
        return out


class _Return(TorchDispatchMode):
    """Backward, where the layer computes again: its operators are not called, their results come back instead."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.next = 0

    def __enter__(self) -> "_Return":
        self.next = 0
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func not in self.layer.offload.operators:
            return func(*args, **(kwargs or {}))
        kept, form, indices = self.layer.results[self.next]
        if func is not kept:
            raise RuntimeError(f"backward calls {func} where forward has called {kept}: the layer is not deterministic")
        self.next += 1
        return tree_unflatten([self.layer.take(index).detach() for index in indices], form)
