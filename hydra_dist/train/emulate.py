"""A configuration's ranks in one process, on one GPU or a CPU, beside the same steps on one rank.

Everything that crosses ranks is the code of a real run: plans, strategies, halos, losses summed over ranks. What is not
here is ZeRO, which needs processes: all ranks share one set of parameters, their gradients add up in it, and one
optimizer moves it. (``launch/emulate.sh`` starts real processes on one GPU.)
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hydra_dist.config import Config, ModelConfig
from hydra_dist.context import ContextParallel, EmulatedMesh, Traffic, run_ranks
from hydra_dist.costs.strategy import Choice, resolve
from hydra_dist.data import Batch
from hydra_dist.model import Transformer, initialize
from hydra_dist.model.prologue import Prologue
from hydra_dist.train.engine import resolve_precision
from hydra_dist.train.optimizer import build_optimizer
from hydra_dist.train.schedule import learning_rate_factor

TOLERANCE = {"fp32": 1e-5, "bf16_autocast": 2e-2}
"""How far the loss over ranks may be from that of one rank, relative; gradient norms ten times as far."""

Batches = Callable[[int], list[Batch]]
"""The micro-batches of a step."""


@dataclass(frozen=True)
class Step:
    """What one update came to."""

    loss: float
    gradient_norm: float


@dataclass(frozen=True)
class Emulation:
    """What some steps over emulated ranks came to.

    Attributes:
        choice: how the ranks share a sequence.
        precision: ``fp32`` or ``bf16_autocast``.
        steps: over ranks.
        alone: the same steps on one rank; empty where they were not wanted.
        traffic: what each rank sent in all steps (``SequencePlan.stats``).
        peak_bytes: the most that was allocated on the GPU at a time, all ranks together; None on a CPU.
        left_out: settings that a run of processes follows and this one does not; none changes what is computed, up to
            rounding.
    """

    choice: Choice
    precision: str
    steps: list[Step]
    alone: list[Step]
    traffic: list[dict[str, Any]]
    peak_bytes: int | None
    left_out: tuple[str, ...] = ()

    @property
    def difference(self) -> tuple[float, float]:
        """The largest relative difference from one rank, of the loss and of the gradient norm."""
        pairs = list(zip(self.steps, self.alone, strict=True)) if self.alone else []
        losses = [abs(a.loss - b.loss) / abs(b.loss) for a, b in pairs]
        norms = [abs(a.gradient_norm - b.gradient_norm) / b.gradient_norm for a, b in pairs]
        return max(losses, default=0.0), max(norms, default=0.0)

    @property
    def agrees(self) -> bool:
        """Whether the steps over ranks are those of one rank, up to rounding."""
        loss, norm = self.difference
        every = (*self.steps, *self.alone)
        finite = all(math.isfinite(step.loss) and math.isfinite(step.gradient_norm) for step in every)
        return finite and loss <= TOLERANCE[self.precision] and norm <= 10 * TOLERANCE[self.precision]


def emulate(
    config: Config,
    model: ModelConfig,
    batches: Batches,
    *,
    steps: int,
    device: torch.device,
    compare: bool = True,
    timeout: float = 600.0,
) -> Emulation:
    """Train some steps over ``context.size`` emulated ranks and, to compare, on one.

    Args:
        config: of the run; one data replica of it is emulated.
        model: with the vocabulary size set.
        batches: the data.
        compare: also train on one rank, which has to hold whole sequences.
        timeout: seconds that a rank waits for another one.
    """
    choice = resolve(config)
    precision = "fp32" if resolve_precision(config, device) == "fp32" else "bf16_autocast"
    run = _Run(config, model, device, precision, timeout)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    over_ranks = [run.step(batches(step), step, choice) for step in range(steps)]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    traffic = [sent.stats() for sent in run.traffic]
    alone: list[Step] = []
    if compare:
        del run
        single = _Run(config, model, device, precision, timeout)
        alone = [single.step(batches(step), step, None) for step in range(steps)]
    return Emulation(choice, precision, over_ranks, alone, traffic, peak, _left_out(config, device))


def report(found: Emulation) -> str:
    """What a user reads: how ranks share a sequence, each step beside one rank's, and what ranks sent."""
    chosen = found.choice.chosen
    lines = [f"{chosen.ring * chosen.ulysses} emulated ranks ({chosen.grid}: {found.choice.why}), {found.precision}"]
    for index, step in enumerate(found.steps):
        line = f"step {index + 1}: loss {step.loss:.6f}, gradient norm {step.gradient_norm:.6f}"
        if found.alone:
            alone = found.alone[index]
            line += f"; one rank: {alone.loss:.6f}, {alone.gradient_norm:.6f}"
        lines.append(line)
    for direction in ("forward", "backward"):
        sent = [rank[direction] for rank in found.traffic]
        most, messages = max(one["bytes"] for one in sent), max(one["messages"] for one in sent)
        lines.append(f"{direction}: {most / 2**20:,.2f} MiB in {messages:,} messages from the rank that sent most")
    if found.peak_bytes is not None:
        lines.append(f"{found.peak_bytes / 2**30:.2f} GiB allocated at most, all ranks together")
    if found.left_out:
        lines.append(f"left out where ranks share a process: {', '.join(found.left_out)}")
    if found.alone:
        loss, norm = found.difference
        verdict = "agree with" if found.agrees else "DIFFER from"
        lines.append(f"they {verdict} one rank: loss within {loss:.1e}, gradient norm within {norm:.1e} (relative)")
    return "\n".join(lines)


def _left_out(config: Config, device: torch.device) -> tuple[str, ...]:
    asked = {
        f"zero.stage {config.zero.stage}": config.zero.stage > 0,
        "train.compile": config.train.compile,
        "train.activation_offload": config.train.activation_offload,
        "train.precision bf16 (bf16_autocast here)": resolve_precision(config, device) == "bf16",
    }
    return tuple(name for name, is_asked in asked.items() if is_asked)


class _Run:
    """A model and its optimizer, and the ranks that share them."""

    def __init__(
        self, config: Config, model: ModelConfig, device: torch.device, precision: str, timeout: float
    ) -> None:
        self.config, self.device, self.precision, self.timeout = config, device, precision, timeout
        self.model = Transformer(
            model,
            activation_checkpointing=config.train.activation_checkpointing,
            loss_chunk_size=config.train.loss_chunk_size,
            mlp_tile_size=config.train.mlp_tile_size,
        )
        initialize(self.model, config.train.seed)
        self.model.to(device)
        self.optimizer = build_optimizer(self.model, config.optimizer, None)
        self.prologues = [module for module in self.model.modules() if isinstance(module, Prologue)]
        self.traffic: list[Traffic] = []  # what each rank sent, over all steps

    def step(self, batches: list[Batch], step: int, choice: Choice | None) -> Step:
        """One update; ``choice`` None: on one rank."""
        num_targets = max(1, sum(int((batch.targets >= 0).sum()) for batch in batches))
        for prologue in self.prologues:
            prologue.refresh_logit_bound(0.0)
        if choice is None:
            nll = self._passes(ContextParallel(), batches, num_targets)
        else:
            nll = self._over_ranks(choice, batches, num_targets)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        clip = self.config.optimizer.gradient_clipping
        if clip and norm > clip:
            torch._foreach_mul_(gradients, clip / (norm + 1e-6))
        factor = learning_rate_factor(self.config.schedule, step, self.config.train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Step(nll / num_targets, norm)

    def _over_ranks(self, choice: Choice, batches: list[Batch], num_targets: int) -> float:
        chosen = choice.chosen

        def rank(mesh: EmulatedMesh) -> float:
            context = ContextParallel(mesh, chosen.strategy, self.config.context.layout, inner_ring=chosen.inner_ring)
            context.traffic.parent = self.traffic[mesh.rank]
            return self._passes(context, batches, num_targets)

        shape = (chosen.ring, chosen.ulysses)
        self.traffic = self.traffic or [Traffic() for _ in range(chosen.ring * chosen.ulysses)]
        return sum(run_ranks(shape, rank, device=self.device, timeout=self.timeout))

    def _passes(self, context: ContextParallel, batches: list[Batch], num_targets: int) -> float:
        """Forward and backward of all micro-batches on one rank; the sum of its losses."""
        total = 0.0
        for batch in batches:
            plan = context.plan(batch.tokens.shape[1], batch.document_starts, device=self.device)
            tokens, targets = (plan.shard(rows.to(self.device), dim=1) for rows in (batch.tokens, batch.targets))
            mixed = torch.autocast(self.device.type, torch.bfloat16) if self.precision != "fp32" else nullcontext()
            with mixed:
                nll: Tensor = self.model(tokens, plan, targets=targets)
            (nll / num_targets).backward()
            total += float(nll.detach())
        return total
