"""Where each parameter's fp32 master weight lies in a DeepSpeed engine: the only file that knows its inner layout.

| stage | master weights | a rank holds of one parameter |
|---|---|---|
| 0 | the model's parameters | all of it |
| 1, 2 | one flat tensor a parameter group, cut into equal parts over ranks | what its part overlaps, maybe nothing |
| 3 | flat tensors of whole sub-groups; each parameter is cut by itself, padded to a multiple of the ranks | its slice |

bf16 at stage 1 with fp32 gradient accumulation is another class (``BF16_Optimizer``) with the layout of stages 1 and 2.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """One parameter, and this rank's part of its master weight."""

    parameter: Tensor
    shape: tuple[int, ...]
    """The whole parameter's."""
    master: Tensor
    """The tensor by which the optimizer keys its state; holds other parameters too where ZeRO flattens."""
    start: int
    """First element of the part within ``master``."""
    held: int
    """Elements of the part; 0 where other ranks hold them all."""
    offset: int
    """First element of the part within the flat parameter."""
    replicated: bool
    """Every rank holds all of it."""

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return torch.Size(self.shape).numel()

    def write_working_copy(self, whole: Tensor, part: Tensor) -> None:
        """Set what forward and backward read, in its own dtype, from the flat parameter and this rank's part of it."""
        partition = getattr(self.parameter, "ds_tensor", None)
        if partition is None:
            self.parameter.data.view(-1).copy_(whole)
            return
        partition.data.view(-1)[: self.held].copy_(part)
        if self.parameter.data.numel() == self.numel and self.numel:  # kept gathered: a small, persistent one
            self.parameter.data.view(-1).copy_(whole)


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that does the arithmetic, under whatever DeepSpeed wrapped around it."""
    return engine.basic_optimizer


def master_groups(engine: Any) -> list[list[Tensor]]:
    """The master weights of each parameter group of the inner optimizer, in its order.

    At stage 3 the optimizer's own lists are empty between steps.
    """
    wrapper = engine.optimizer
    kind = _kind(engine)
    if kind != "stage 3":
        return [list(group["params"]) for group in engine.basic_optimizer.param_groups]
    groups: list[list[Tensor]] = [[] for _ in engine.basic_optimizer.param_groups]
    for sub_group, master in enumerate(wrapper.fp32_partitioned_groups_flat):
        groups[wrapper.sub_group_to_group_id[sub_group]].append(master)
    return groups


def place_parameters(engine: Any) -> dict[str, Placement]:
    """Every parameter of the engine's module by its first name, in the order of ``named_parameters``."""
    kind = _kind(engine)
    named = dict(engine.module.named_parameters())
    if kind == "stage 3":
        return {name: _place_sliced(parameter, engine.optimizer) for name, parameter in named.items()}
    if kind == "plain":
        return {name: _place_whole(parameter) for name, parameter in named.items()}
    wrapper = engine.optimizer
    flat, grouped = (
        (wrapper.fp32_groups_flat_partition, wrapper.bf16_groups)
        if kind == "bf16"
        else (wrapper.single_partition_of_fp32_groups, wrapper.bit16_groups)
    )
    group_of = {id(parameter): index for index, group in enumerate(grouped) for parameter in group}
    return {
        name: _place_fragment(parameter, flat[group_of[id(parameter)]])
        if id(parameter) in group_of
        else _place_whole(parameter)
        for name, parameter in named.items()
    }


def _kind(engine: Any) -> str:
    # DeepSpeed reads DS_ACCELERATOR when it is imported, which is for whoever makes the engine to set.
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    wrapper = engine.optimizer
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        if wrapper.swap_optimizer or wrapper.params_in_nvme_and_cpu:
            raise ValueError("training state on NVMe cannot be read by parameter")
        return "stage 3"
    if isinstance(wrapper, DeepSpeedZeroOptimizer):
        return "stages 1 and 2"
    if isinstance(wrapper, BF16_Optimizer):
        return "bf16"
    if wrapper is engine.basic_optimizer:
        return "plain"
    raise ValueError(f"training state under {type(wrapper).__name__} cannot be read by parameter")


def _place_whole(parameter: Tensor) -> Placement:
    return Placement(parameter, tuple(parameter.shape), parameter, 0, parameter.numel(), 0, replicated=True)


def _place_fragment(parameter: Any, flat: Tensor) -> Placement:
    mapping = parameter._hp_mapping
    shape = tuple(parameter.shape)
    if mapping is None:
        return Placement(parameter, shape, flat, 0, 0, 0, replicated=False)
    inside, within = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Placement(parameter, shape, flat, inside.start, inside.numel, within.start, replicated=False)


def _place_sliced(parameter: Any, wrapper: Any) -> Placement:
    shape = tuple(parameter.ds_shape)
    offset = dist.get_rank(group=parameter.ds_process_group) * parameter.partition_numel()
    held = max(0, min(parameter.partition_numel(), parameter.ds_numel - offset))
    if not parameter.requires_grad:
        return Placement(parameter, shape, parameter.ds_tensor, 0, held, offset, replicated=False)
    sub_group, start, _ = wrapper.grad_position[wrapper.get_param_id(parameter)]
    master = wrapper.fp32_partitioned_groups_flat[sub_group]
    return Placement(parameter, shape, master, start, held, offset, replicated=False)
