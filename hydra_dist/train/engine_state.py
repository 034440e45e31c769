"""A DeepSpeed engine's training state by parameter name, whatever its ZeRO stage.

ZeRO keeps the fp32 master weights and the optimizer state of many parameters flattened and cut over the ranks. What a
checkpoint wants is the opposite: one whole tensor a parameter and state, so that a run can go on at another stage or
world size. ``EngineState`` translates between the two. Where each rank's elements lie is ``engine_state_layout.py``.

The optimizer's tensors are read where the optimizer keeps them rather than through DeepSpeed's ``safe_get`` and
``safe_set`` functions: those return nothing at stage 0, lose the states of every parameter group but the first at
stages 1 and 2 (they are linked when only that group has stepped), cannot write a parameter at stage 3 whose elements do
not divide by the ranks, and add up bit patterns as floats, so that -0.0 comes back as 0.0.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hydra_dist.train.checkpoint.state import WEIGHT
from hydra_dist.train.engine_state_layout import Placement, inner_optimizer, master_groups, place_parameters

ELEMENTS_AT_ONCE = 2**26
"""Elements of one parameter that are on the device at once while its parts are collected: 256 MiB in fp32."""


class EngineState:
    """Weights and optimizer state of a DeepSpeed engine as whole tensors, one a parameter and state.

    Works for ZeRO stages 0 to 3 (0 in fp32 only), optimizer offload to the CPU included, and for every optimizer whose
    states are tensors of the parameter's size plus a scalar ``step``. A tied parameter appears once, under its first
    name. Frozen parameters have a weight and no optimizer state.

    Raises:
        ValueError: the engine's optimizer is of a kind whose state cannot be told apart by parameter (bf16 without
            ZeRO, state on NVMe, states of other shapes).
    """

    def __init__(self, engine: Any) -> None:
        self._optimizer = inner_optimizer(engine)
        self._groups = master_groups(engine)
        self._placements = place_parameters(engine)
        self._device = torch.device(engine.device)
        self._process_group = getattr(engine.optimizer, "dp_process_group", None)
        self.stage: int = engine.zero_optimization_stage()
        self.names: list[str] = list(self._placements)

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole parameter's shape, also where ZeRO-3 has emptied it."""
        return self._placements[name].shape

    def numel(self, name: str) -> int:
        """Elements of the whole parameter."""
        return self._placements[name].numel

    def keys(self, name: str) -> tuple[str, ...]:
        """``weight`` and the names of the parameter's optimizer states; the latter exist after one step only."""
        return (WEIGHT, *self._states(self._placements[name]))

    def dtype(self, name: str, key: str) -> torch.dtype:
        """dtype of ``read_tensor(name, key)``: weights at least fp32, optimizer states as the optimizer keeps them."""
        kept = self._source(self._placements[name], key).dtype
        return torch.promote_types(kept, torch.float32) if key == WEIGHT else kept

    def read(self, name: str) -> dict[str, Tensor]:
        """Every tensor of a parameter, whole and on the CPU. Collective: all ranks call with the same names in turn."""
        return {key: value for key in self.keys(name) if (value := self.read_tensor(name, key)) is not None}

    def read_tensor(self, name: str, key: str, wanted: bool = True) -> Tensor | None:
        """One tensor of a parameter, whole and on the CPU, bit for bit; None on a rank that only takes part.

        Collective: all ranks call with the same name and key; ``wanted`` may differ.
        """
        placement = self._placements[name]
        dtype = self.dtype(name, key)
        if placement.replicated:
            if not wanted:
                return None
            return self._source(placement, key).to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        local = self._local(placement, key)
        whole = torch.empty(placement.numel, dtype=dtype) if wanted else None
        for start in range(0, placement.numel, ELEMENTS_AT_ONCE):
            stop = min(start + ELEMENTS_AT_ONCE, placement.numel)
            part = torch.zeros(stop - start, dtype=dtype, device=self._device)
            first, last = max(start, placement.offset), min(stop, placement.offset + local.numel())
            if first < last:
                part[first - start : last - start] = local[first - placement.offset : last - placement.offset]
            # Every element is held by one rank and zero elsewhere: adding up the bits as integers is exact.
            bits = part.view(torch.int32 if dtype.itemsize % 4 == 0 else torch.uint8)
            dist.all_reduce(bits, group=self._process_group)
            if whole is not None:
                whole[start:stop] = part
        return whole.view(placement.shape) if whole is not None else None

    def write(self, name: str, values: dict[str, Tensor]) -> None:
        """Set every tensor of a parameter, from whole tensors. All ranks call with the same values.

        Raises ValueError where the keys are not exactly ``keys(name)``: one left out would keep its old value.
        """
        if set(values) != set(self.keys(name)):
            raise ValueError(f"{name} has {sorted(self.keys(name))}, got {sorted(values)}")
        for key, value in values.items():
            self.write_tensor(name, key, value)

    @torch.no_grad()
    def write_tensor(self, name: str, key: str, value: Tensor) -> None:
        """Set one tensor of a parameter from the whole tensor, of which only this rank's part is touched.

        Writing ``weight`` also sets the working copy that the next forward reads. Nothing is communicated, but a rank
        that leaves it out trains on other weights. Raises ValueError for another shape.
        """
        placement = self._placements[name]
        if tuple(value.shape) != placement.shape:
            raise ValueError(f"{name} {key} has shape {tuple(value.shape)}, the engine's has {placement.shape}")
        if placement.replicated:
            self._source(placement, key).copy_(value)
            return
        flat = value.reshape(-1)
        local = self._local(placement, key)
        part = flat[placement.offset : placement.offset + local.numel()]
        local.copy_(part)
        if key == WEIGHT:
            placement.write_working_copy(flat, part)

    @property
    def step(self) -> int:
        """Steps that the optimizer has counted (the t of Adam's bias correction); 0 before the first."""
        steps = {int(holder["step"]) for holder in self._step_holders()}
        if len(steps) > 1:
            raise ValueError(f"parameters of one optimizer have counted different steps: {sorted(steps)}")
        return steps.pop() if steps else 0

    @step.setter
    def step(self, value: int) -> None:
        for holder in self._step_holders():
            if isinstance(holder["step"], Tensor):
                holder["step"].fill_(value)
            else:
                holder["step"] = type(holder["step"])(value)

    @torch.no_grad()
    def prepare_for_loading(self) -> None:
        """Create the optimizer's state, which otherwise exists after its first step only, and change nothing else.

        Each master weight takes one step of the inner optimizer with a zero gradient and is put back; the optimizer's
        settings and its step count are put back too. The engine's counters, schedule and data are not involved, and the
        first real step afterwards is the one that would have come without this. Does nothing where the state exists.
        """
        missing = [
            (master, index)
            for index, masters in enumerate(self._groups)
            for master in masters
            if not self._optimizer.state.get(master)
        ]
        if not missing:
            return
        settings = [{**group, "params": list(group["params"])} for group in self._optimizer.param_groups]
        for master, index in missing:
            weight, gradient = master.detach().clone(), master.grad
            for position, group in enumerate(self._optimizer.param_groups):
                group["params"] = [master] if position == index else []
            master.grad = torch.zeros_like(master)
            self._optimizer.step()
            master.grad = gradient
            master.data.copy_(weight)
            if "step" in (state := self._optimizer.state[master]):
                state["step"] = state["step"] * 0
        for group, setting in zip(self._optimizer.param_groups, settings, strict=True):
            group.update(setting)

    def _source(self, placement: Placement, key: str) -> Tensor:
        """The optimizer's own memory that holds this rank's elements of a tensor, and maybe other parameters' too."""
        return (placement.master if key == WEIGHT else self._states(placement)[key]).detach()

    def _local(self, placement: Placement, key: str) -> Tensor:
        """This rank's elements of a tensor that is cut over the ranks, flat: a view of the optimizer's own memory."""
        return self._source(placement, key).view(-1)[placement.start : placement.start + placement.held]

    def _states(self, placement: Placement) -> dict[str, Tensor]:
        """The optimizer's tensors beside a master weight. ValueError for one that cannot be cut by parameter."""
        states: dict[str, Tensor] = {}
        for key, value in self._optimizer.state.get(placement.master, {}).items():
            if isinstance(value, Tensor) and value.shape == placement.master.shape and key != "step":
                states[key] = value
            elif key != "step":
                raise ValueError(f'optimizer state "{key}" is not a tensor of its parameter\'s shape')
        return states

    def _step_holders(self) -> Iterator[dict[str, Any]]:
        for holder in (*self._optimizer.state.values(), *self._optimizer.param_groups):
            if "step" in holder:
                yield holder
