"""Does ring attention give the numbers of one device, with this configuration? Found out by doing it."""

from dataclasses import dataclass

import torch

from hydra_dist.context import EmulatedMesh, run_ranks
from hydra_dist.drop_in.attention import ContextParallelAttention, ContextParallelAttentionConfig

ROWS = 64
"""Of a rank."""
TOLERANCE = 1e-9
"""In fp64, relative, for a layer's output and its gradients."""


@dataclass(frozen=True)
class SetupReport:
    """What a layer over emulated ranks came to, beside one device.

    Attributes:
        ranks: (ring, ulysses).
        largest_error: of the output and of every gradient, relative to the largest element of each.
        works: whether it is rounding.
        bytes_sent: by the rank that sent most, forward and backward.
    """

    ranks: tuple[int, int]
    largest_error: float
    works: bool
    bytes_sent: int


def validate_ring_attention_setup(
    config: ContextParallelAttentionConfig, ranks: int | tuple[int, int] = 4, device: str = "cpu"
) -> SetupReport:
    """Run a layer forward and backward over emulated ranks and on one device, in fp64, and compare.

    Args:
        config: a ``RingAttentionConfig``, or one of any other strategy.
        ranks: P, or (ring, ulysses).
        device: ``cpu``, or the GPU that all ranks share.

    Raises:
        ConfigError: settings that do not go together.
    """
    if not isinstance(ranks, tuple):
        ranks = (1, ranks) if config.strategy == "ulysses" else (ranks, 1)
    length = ROWS * ranks[0] * ranks[1] + 1  # so that shards are uneven
    generator = torch.Generator().manual_seed(config.seed)
    x = torch.randn(1, length, config.hidden_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(1, length, config.hidden_size, generator=generator, dtype=torch.float64)

    def step(mesh: EmulatedMesh | None) -> tuple[list[torch.Tensor], int]:
        layer = ContextParallelAttention(config, mesh).double().to(device)
        seq = layer.context.plan(length, device=torch.device(device))
        local = seq.shard(x.to(device), 1).requires_grad_()
        out = layer(local, seq)
        out.backward(seq.shard(weight.to(device), 1))
        stats = seq.stats()
        sent = stats["forward"]["bytes"] + stats["backward"]["bytes"]
        assert local.grad is not None
        rows = [seq.unshard(out.detach(), 1), seq.unshard(local.grad, 1)]
        return [*rows, *(p.grad for p in layer.parameters() if p.grad is not None)], sent

    results = run_ranks(ranks, step, device=device)
    expected, _ = step(None)
    found = [tensors for tensors, _ in results]
    of_parameters = [torch.stack(parts).sum(0) for parts in zip(*(tensors[2:] for tensors in found), strict=True)]
    whole = [*found[0][:2], *of_parameters]
    errors = [(a - b).abs().max() / b.abs().max().clamp_min(1e-300) for a, b in zip(whole, expected, strict=True)]
    error = float(torch.stack(errors).max())  # NaN where one is
    return SetupReport(ranks, error, error < TOLERANCE, max(sent for _, sent in results))
