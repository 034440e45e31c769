"""AdamW, and Muon for the matrices of the layers, also where ZeRO has cut the parameters into flat partitions.

Muon (Jordan et al. 2024) moves a matrix along its momentum with all singular values set to about one. That needs whole
matrices, and ZeRO stages 1 and 2 give each rank a slice of one flat vector per parameter group. The momentum is
elementwise and stays sliced; the slices are gathered once a step, and each rank orthogonalises the matrices that reach
into its own slice.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hydra_dist.config import OptimizerConfig
from hydra_dist.model import parameter_groups

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Jordan et al. 2024): steep at zero, singular values end within 0.7 to 1.2."""
NEWTON_SCHULZ_STEPS = 5


def build_optimizer(model: nn.Module, config: OptimizerConfig, world: dist.ProcessGroup | None) -> torch.optim.AdamW:
    """The optimizer that the configuration names. Every group has its peak rate under ``peak_lr``.

    Args:
        world: the ranks over which ZeRO cuts the parameters.
    """
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    groups = parameter_groups(model, config.weight_decay)
    if config.name == "adamw":
        optimizer = torch.optim.AdamW(groups, **settings)
    else:
        optimizer = Muon(_split_off_matrices(model, groups, config), world, **settings)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def _split_off_matrices(
    model: nn.Module, groups: list[dict[str, Any]], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """The linear layers' weights inside the blocks as a group of their own, at the front.

    What else has two dimensions stays with AdamW: the embedding and the head, whose rows are looked up one by one, and
    taps and biases, which are no matrices.
    """
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    matrices = [p for name, p in model.named_parameters() if name.startswith("layers.") and id(p) in linear]
    taken = {id(p) for p in matrices}
    muon = {
        "params": matrices,
        "lr": config.muon_learning_rate,
        "momentum": config.muon_momentum,
        "weight_decay": config.weight_decay,
        "shapes": [tuple(p.shape) for p in matrices],
    }
    rest = [{**group, "params": [p for p in group["params"] if id(p) not in taken]} for group in groups]
    return [muon, *(group for group in rest if group["params"])]


class Muon(torch.optim.AdamW):
    """Muon for the groups that carry ``shapes`` (of their matrices, in order), AdamW for all others.

    The parameters of such a group are the matrices themselves, or (ZeRO 1 and 2) one flat slice of them: rank r of
    ``world`` holds elements [r n, (r + 1) n) of the matrices laid end to end, zero-padded to equal n.
    """

    def __init__(self, groups: list[dict[str, Any]], world: dist.ProcessGroup | None, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self._world = world

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every group."""
        assert closure is None
        groups = self.param_groups
        for group in groups:
            if "shapes" in group:
                self._step_matrices(group)
        # AdamW walks over param_groups itself; the matrices are done.
        self.param_groups = [group for group in groups if "shapes" not in group]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _step_matrices(self, group: dict[str, Any]) -> None:
        moved = [self._momentum(p, group["momentum"]) for p in group["params"] if p.grad is not None]
        parameters = [p for p in group["params"] if p.grad is not None]
        for p in parameters:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        if all(p.dim() == 2 for p in parameters):
            for p, update in zip(parameters, moved, strict=True):
                p.add_(_orthogonal_step(update), alpha=-group["lr"])
        else:
            for p, update in zip(parameters, moved, strict=True):
                self._step_slice(p, update, group)

    def _momentum(self, p: Tensor, beta: float) -> Tensor:
        """Nesterov momentum: the gradient one step ahead."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        assert p.grad is not None
        state["momentum_buffer"].lerp_(p.grad, 1 - beta)
        return p.grad.lerp(state["momentum_buffer"], beta)

    def _step_slice(self, slice_: Tensor, update: Tensor, group: dict[str, Any]) -> None:
        world_size = dist.get_world_size(self._world)
        # bf16 is what the iteration runs in, so nothing more is sent.
        gathered = [torch.empty_like(update, dtype=torch.bfloat16) for _ in range(world_size)]
        dist.all_gather(gathered, update.bfloat16(), group=self._world)
        whole = torch.cat(gathered)
        mine = dist.get_rank(self._world) * update.numel()
        start = 0
        for rows, columns in group["shapes"]:
            stop = start + rows * columns
            first, last = max(start, mine), min(stop, mine + update.numel())
            if first < last:
                step = _orthogonal_step(whole[start:stop].view(rows, columns)).flatten()
                slice_[first - mine : last - mine].add_(step[first - start : last - start], alpha=-group["lr"])
            start = stop


def _orthogonal_step(update: Tensor) -> Tensor:
    """``update`` with singular values near one, scaled so that a tall matrix changes its output as a wide one does."""
    rows, columns = update.shape
    return orthogonalise(update).float() * max(1.0, rows / columns) ** 0.5


def orthogonalise(matrix: Tensor) -> Tensor:
    """U V^T of ``matrix`` = U S V^T, roughly, by the Newton-Schulz iteration in bf16; zero stays zero."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
