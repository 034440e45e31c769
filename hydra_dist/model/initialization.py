"""Starting values, and which parameters weight decay acts on.

A parameter's values follow from (seed, its name) alone: the same on every rank, device and dtype, whatever else the
model has and in whatever order it was built.

- Matrices and the embedding: normal with ``init_std``, cut off at three of them; those that write into the residual
  stream are divided by sqrt(2 x layers), so that its size does not grow with depth (Radford et al. 2019, section 2.3).
- Convolutions: the identity (1 at the current row's tap) plus uniform noise, a tenth of torch's default for Conv1d.
  The default, noise alone, leaves a query and its group's key to the q-k-mean at first, which makes them nearly the
  same vector: a row then sees mostly itself. Their biases start at 0. ``induction_layers`` start as described below.
- Norm weights 1; tau so that the temperature is 1 (``exp_clamp``: 1.01, inside the clamp, where tau has a gradient).
"""

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from hydra_dist.model.ccgqa import CCGQA
from hydra_dist.model.gqa import GQA
from hydra_dist.model.loss import Head
from hydra_dist.model.mlp import MLP
from hydra_dist.model.norm import RMSNorm
from hydra_dist.model.prologue import START_OF_TAU, Prologue
from hydra_dist.model.transformer import Transformer

CUT = 3.0
"""Standard deviations at which the normal distribution is cut off."""
CONVOLUTION_NOISE = 0.1
"""Over torch's default for Conv1d, which is uniform within 1/sqrt(inputs summed)."""


@torch.no_grad()
def initialize(model: nn.Module, seed: int, *, init_std: float | None = None) -> None:
    """Set every parameter of a ``Transformer`` (or, with ``init_std``, of one layer) as described above.

    Before ZeRO-3 takes the parameters apart. Raises ValueError for a parameter that it has no rule for.
    """
    num_layers = 1
    if isinstance(model, Transformer):
        num_layers, init_std = model.config.num_layers, init_std or model.config.init_std
    if init_std is None:
        raise ValueError(f"init_std is needed for a {type(model).__name__}, which has no configuration to say it")
    outputs = {id(linear) for module in model.modules() if (linear := _writes_residual(module)) is not None}
    done: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            std = init_std / math.sqrt(2 * num_layers) if id(module) in outputs else init_std
            generator = _generator(seed, f"{module_name}.{name}" if module_name else name)
            parameter.copy_(_starting_values(module, name, parameter, std, generator))
    if isinstance(model, Transformer):
        for layer in model.config.induction_layers:
            attention = model.layers[layer].attention
            assert isinstance(attention, CCGQA)
            _start_as_induction(attention)


def _start_as_induction(layer: CCGQA) -> None:
    """Let queries look for the row that followed an earlier one like theirs (Olsson et al. 2022, arXiv 2209.11895).

    Queries get the projection of their key head, so that equal rows match, and the keys' first convolution starts at
    the row before instead of the current one: the key of a row answers to the row before it, and its value is the row.
    """
    taps = layer.prologue.depthwise_weight
    assert taps is not None
    group = layer.num_query_heads // layer.num_key_heads
    q_size = layer.num_query_heads * layer.head_dim
    keys = layer.down.weight[q_size : layer.latent_size].unflatten(0, (layer.num_key_heads, layer.head_dim))
    layer.down.weight[:q_size] = keys.repeat_interleave(group, dim=0).flatten(0, 1)
    taps[q_size:, -2] += 1.0
    taps[q_size:, -1] -= 1.0


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups: the matrices of the layers and an untied head with ``weight_decay``, the rest with 0.

    Without decay go norms, biases, tau, the depthwise taps (a handful of numbers a channel, none of which scales a
    sum over channels) and the embedding, also where it is the head: its rows are updated as often as their tokens
    occur, but would decay every step.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    done: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            is_matrix = isinstance(module, nn.Linear | Head) or name == "grouped_weight"
            (decayed if is_matrix and name != "bias" else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def _writes_residual(module: nn.Module) -> nn.Linear | None:
    if isinstance(module, CCGQA | GQA):
        return module.output
    return module.down if isinstance(module, MLP) else None


def _starting_values(
    module: nn.Module, name: str, parameter: nn.Parameter, std: float, generator: torch.Generator
) -> Tensor:
    """On CPU in fp32, whatever the parameter is, so that device and dtype change nothing but the rounding."""
    values = torch.empty(parameter.shape)
    if isinstance(module, RMSNorm):
        return values.fill_(1.0)
    if name.endswith("bias"):
        return values.zero_()
    if isinstance(module, Prologue) and name == "tau":
        return values.fill_(START_OF_TAU[module.temperature])
    if isinstance(module, Prologue):
        bound = CONVOLUTION_NOISE / math.sqrt(values.shape[1])  # taps of a channel, or taps x channels of a head
        values.uniform_(-bound, bound, generator=generator)
        if name == "depthwise_weight":
            values[:, -1] += 1.0
        else:
            head_dim = module.switches.head_dim
            values[:, -head_dim:] += torch.eye(head_dim)
        return values
    if isinstance(module, nn.Linear | nn.Embedding | Head):
        return nn.init.trunc_normal_(values, std=std, a=-CUT * std, b=CUT * std, generator=generator)
    raise ValueError(f"no starting values for {name} of {type(module).__name__}")


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
