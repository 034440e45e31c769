"""The CCGQA prologue as a chain of PyTorch's own operators with autograd: what the fused operator is compared with.

Two ``conv1d``, q-k-mean, q-k-norm in fp32, rotation and value shift, each an operator that writes its result to memory,
as published implementations of the layer have it. One document; rows before the sequence are zero.
"""

import torch
from torch import Tensor
from torch.nn import functional

from hydra_dist.model.prologue import Prologue
from hydra_dist.model.rope import Rope, rotate


def eager_chain(module: Prologue, p: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
    """What ``module`` computes for p [B, S, C + V]: q [B, S, Hq, D], k and v [B, S, Hk, D]."""
    switches = module.switches
    if not switches.use_qk_mean or switches.eps is None or not switches.value_shift or module.taps is None:
        raise ValueError("the chain is that of a prologue with everything switched on")
    heads, head_dim = (switches.num_query_heads, switches.num_key_heads), switches.head_dim
    z, values = p.split([switches.latent_size, switches.value_size], dim=-1)
    q, k = _convolved(module, z).unflatten(-1, (-1, head_dim)).split(heads, dim=2)
    latent_q, latent_k = z.unflatten(-1, (-1, head_dim)).split(heads, dim=2)
    group = heads[0] // heads[1]
    mean = 0.5 * (latent_q + latent_k.repeat_interleave(group, dim=2))
    q = _normalized(q + mean, switches.eps)
    k = _normalized(k + mean.unflatten(2, (heads[1], group)).mean(3), switches.eps)
    beta = module.beta()
    assert beta is not None
    k = k * beta.unsqueeze(-1)
    current, delayed = values.chunk(2, dim=-1)
    late = functional.pad(delayed[:, :-1], (0, 0, 1, 0))
    v = torch.cat([current, late], dim=-1).unflatten(-1, (-1, head_dim))
    return rotate(q, rope).to(p.dtype), rotate(k, rope).to(p.dtype), v


def _convolved(module: Prologue, z: Tensor) -> Tensor:
    taps, switches = module.taps, module.switches
    assert taps is not None
    num_heads, head_dim, channels = taps.b1.shape[0], switches.head_dim, switches.latent_size
    k1 = switches.kernel_sizes[1]
    grouped = taps.w1.unflatten(1, (k1, head_dim)).permute(0, 3, 2, 1).reshape(channels, head_dim, k1)
    rows = functional.pad(z.mT, (switches.num_rows_before, 0))
    u = functional.conv1d(rows, taps.w0.unsqueeze(1), taps.b0, groups=channels)
    return functional.conv1d(u, grouped, taps.b1.flatten(), groups=num_heads).mT


def _normalized(x: Tensor, eps: float) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
