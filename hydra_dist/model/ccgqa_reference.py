"""CCGQA written row by row from its equations: what the fast layer is tested against.

One device, one batch row at a time, plain loops, no matrix of more than one row where a vector will do; in the dtype of
its inputs (fp64 in tests). Symbols are those of the paper: x residual stream, z = [q~ | k~] latent, u and y outputs of
the two convolutions, m the q-k-mean, beta = exp(tau) the temperature.

Source: Figliolia et al. 2025 (arXiv 2510.04476), section III and listing A.1. Where text and listing differ: one zero
padding in front of the first convolution (listing), exp(tau) (listing), scale 1/sqrt(D).
"""

import math

import torch
from torch import Tensor

from hydra_dist.model.ccgqa import CCGQA
from hydra_dist.model.prologue import NORM_EPS


def ccgqa_reference(layer: CCGQA, x: Tensor, document_starts: Tensor | None = None) -> Tensor:
    """What ``layer`` should give for ``x`` [B, S, E] at positions 0..S-1, [B, S, E]; differentiable.

    ``document_starts`` [B, S]: position of the first row of each row's document; None: one document.
    """
    B, S, _ = x.shape
    starts = torch.zeros(B, S, dtype=torch.long) if document_starts is None else document_starts
    return torch.stack([_one_sequence(layer, x[b], starts[b].tolist()) for b in range(B)])


def _one_sequence(layer: CCGQA, x: Tensor, starts: list[int]) -> Tensor:
    Hq, Hk, D = layer.num_query_heads, layer.num_key_heads, layer.head_dim
    group = Hq // Hk
    switches = layer.prologue.switches
    weight = layer.down.weight
    w_z, w_v = weight[: (Hq + Hk) * D], weight[(Hq + Hk) * D :]
    z = [w_z @ row for row in x]
    queries, keys, values = [], [], []
    for t, start in enumerate(starts):
        y = _convolved(layer, z, t, start)
        latent_q, latent_k = z[t][: Hq * D].view(Hq, D), z[t][Hq * D :].view(Hk, D)
        q = [y[h] for h in range(Hq)]
        k = [y[Hq + j] for j in range(Hk)]
        if switches.use_qk_mean:
            m = [(latent_q[h] + latent_k[h // group]) / 2 for h in range(Hq)]
            q = [q[h] + m[h] for h in range(Hq)]
            k = [k[j] + sum(m[j * group : (j + 1) * group]) / group for j in range(Hk)]
        if layer.prologue.tau is not None:
            beta = _temperatures(layer.prologue.tau, layer.prologue.temperature)
            q = [math.sqrt(D) * q[h] / _length(q[h]) for h in range(Hq)]
            k = [beta[j] * math.sqrt(D) * k[j] / _length(k[j]) for j in range(Hk)]
        queries.append([_rotated(head, t, layer.rope_dim, layer.rope_theta) for head in q])
        keys.append([_rotated(head, t, layer.rope_dim, layer.rope_theta) for head in k])
        half = Hk * D // 2 if layer.use_value_shift else Hk * D
        earlier = w_v[half:] @ x[t - 1] if t > start else torch.zeros_like(w_v[half:] @ x[t])
        values.append(torch.cat([w_v[:half] @ x[t], earlier]).view(Hk, D))
    rows = []
    for t, start in enumerate(starts):
        first = start if layer.window is None else max(start, t - layer.window + 1)
        heads = []
        for h in range(Hq):
            j = h // group
            logits = torch.stack([queries[t][h] @ keys[s][j] for s in range(first, t + 1)]) / math.sqrt(D)
            weights = logits.softmax(0)
            seen = torch.stack([values[s][j] for s in range(first, t + 1)])
            heads.append(weights @ seen)
        row = torch.cat(heads)
        if layer.output_norm is not None:
            row = row / torch.sqrt((row @ row) / len(row) + layer.output_norm.eps) * layer.output_norm.weight
        rows.append(layer.output.weight @ row)
    return torch.stack(rows)


def _temperatures(tau: Tensor, mode: str) -> Tensor:
    return {"exp": tau.exp(), "raw": tau, "exp_clamp": tau.clamp(1e-7, 2).exp()}[mode]


def _convolved(layer: CCGQA, z: list[Tensor], t: int, start: int) -> Tensor:
    """Row ``t`` of the second convolution's output, [heads, D]; without convolutions the latent itself."""
    taps, D = layer.prologue.taps, layer.head_dim
    if taps is None:
        return z[t].view(-1, D)
    k0, k1 = layer.prologue.switches.kernel_sizes

    def u(s: int) -> Tensor:
        """First convolution; s may lie before the document, where z is zero and only the bias is left."""
        total: Tensor = taps.b0
        for j in range(k0):
            source = s - (k0 - 1) + j
            if source >= start:
                total = total + taps.w0[:, j] * z[source]
        return total

    heads = []
    for h in range(layer.num_query_heads + layer.num_key_heads):
        total = taps.b1[h]
        for j in range(k1):
            matrix = taps.w1[h, j * D : (j + 1) * D]  # [D in, D out]
            total = total + u(t - (k1 - 1) + j)[h * D : (h + 1) * D] @ matrix
        heads.append(total)
    return torch.stack(heads)


def _length(head: Tensor) -> Tensor:
    return torch.sqrt(head @ head + NORM_EPS)


def _rotated(head: Tensor, position: int, rope_dim: int, theta: float) -> Tensor:
    rotated = list(head.unbind())
    for i in range(rope_dim // 2):
        angle = position * theta ** (-2 * i / rope_dim)
        a, b = head[i], head[i + rope_dim // 2]
        rotated[i] = a * math.cos(angle) - b * math.sin(angle)
        rotated[i + rope_dim // 2] = b * math.cos(angle) + a * math.sin(angle)
    return torch.stack(rotated)
