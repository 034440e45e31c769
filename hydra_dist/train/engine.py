"""DeepSpeed as the engine: ZeRO stages 0 to 3 over all data x context ranks, behind four verbs.

The loss that comes in is a sum over this rank's targets divided by the number of targets of the whole step, over all
ranks and micro-batches. DeepSpeed averages gradients over its ranks, so the loss is scaled by their number first: what
comes out is the gradient of the mean over all targets, whatever the number of ranks.
"""

import logging
import math
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hydra_dist.config import Config
from hydra_dist.model import Transformer
from hydra_dist.model.prologue import Prologue
from hydra_dist.train.mesh import Mesh
from hydra_dist.train.optimizer import build_optimizer

LARGEST_BUCKET = 500_000_000
"""Elements that one reduction or gather moves at most (DeepSpeed's default)."""


class Engine:
    """A model, its optimizer and ZeRO; the DeepSpeed engine itself is ``deepspeed``."""

    def __init__(self, model: Transformer, config: Config, mesh: Mesh, precision: str) -> None:
        deepspeed = _import_deepspeed(mesh.device)
        if config.train.compile:
            model.compile_layers()
        self._deepspeed_zero = deepspeed.zero
        self.world_size = mesh.world_size
        self.stage = config.zero.stage
        self.clip = config.optimizer.gradient_clipping
        if precision == "bf16_autocast":
            # Around the model's own forward: DeepSpeed's forward switches off an autocast that it finds around itself.
            model.forward = torch.autocast(mesh.device.type, torch.bfloat16)(model.forward)  # type: ignore[method-assign]
        num_parameters = sum(p.numel() for p in model.parameters())
        optimizer = build_optimizer(model, config.optimizer, dist.group.WORLD)
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(config, mesh, precision, num_parameters),
            dist_init_required=False,
        )
        self.optimizer_in_use = type(self.optimizer).__name__
        self._prologues = [module for module in self.module.modules() if isinstance(module, Prologue)]

    @property
    def module(self) -> nn.Module:
        """The model as DeepSpeed holds it."""
        return self.deepspeed.module

    def forward(self, *inputs: Any, **settings: Any) -> Tensor:
        """The model's forward in the run's precision."""
        return self.deepspeed(*inputs, **settings)

    def refresh_logit_bounds(self) -> None:
        """Tell layers how large their logits can be before the next update, so that the ring may merge by addition.

        Once a step, so that it follows from the parameters alone: a resumed run merges as the interrupted one did.
        """
        for prologue in self._prologues:
            if prologue.tau is not None:
                # Without ZeRO-3 every parameter is whole.
                with self._deepspeed_zero.GatheredParameters([prologue.tau], enabled=self.stage == 3):
                    prologue.refresh_logit_bound(0.0)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` (already divided by the step's number of targets) to the step's gradient."""
        self.deepspeed.backward(loss * self.world_size, scale_wrt_gas=False)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()

    def step(self, learning_rate_factor: float) -> float:
        """Clip by the global norm and update; the norm before clipping. Nothing is updated where it is not finite."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_factor
        if self.stage > 0:
            self.deepspeed.step()
            return float(self.deepspeed.get_global_grad_norm())
        # Without ZeRO, DeepSpeed clips but keeps the norm to itself.
        norm = self._clip()
        if math.isfinite(norm):
            self.deepspeed.step()
        return norm

    def _clip(self) -> float:
        """Scale the gradients down to the largest norm allowed; the norm before.

        In fp64: on a CPU torch adds up squares in fp32 one after another, which loses 4e-4 at ten million elements.
        """
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        if self.clip and norm > self.clip:
            torch._foreach_mul_(gradients, self.clip / (norm + 1e-6))
        return norm

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self.deepspeed.destroy()


def deepspeed_config(config: Config, mesh: Mesh, precision: str, num_parameters: int) -> dict[str, Any]:
    """What DeepSpeed is told; everything it would otherwise decide by itself is said."""
    stage = config.zero.stage
    # Buckets are allocated whole, so none is larger than the model; DeepSpeed wants an even number.
    bucket = min(LARGEST_BUCKET, num_parameters + num_parameters % 2)
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.train.gradient_accumulation_steps,
        "gradient_clipping": config.optimizer.gradient_clipping if stage else 0.0,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": mesh.device.type == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_param_persistence_threshold": 0,
        },
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def resolve_precision(config: Config, device: torch.device) -> str:
    """What ``train.precision: auto`` stands for on this device."""
    if config.train.precision != "auto":
        return config.train.precision
    if device.type == "cpu":
        return "fp32"
    return "bf16" if config.zero.stage else "bf16_autocast"


def _import_deepspeed(device: torch.device) -> Any:
    # Read once, at DeepSpeed's import; on a machine with a GPU it would otherwise take that for a CPU run too.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # DeepSpeed asks for what torchrun sets, also of a process that was started without it.
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by the names that torch 2.11 knows.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed", category=FutureWarning)
    # A shared-memory all-reduce for inference that takes a C++ compiler and a minute to build; training never calls it.
    __compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
    return deepspeed
