"""The training loop: read a step's rows, sum the loss over the ranks, update, log, save.

What a step does depends on (configuration, step) alone: the rows come from (seed, step), the learning rate from the
step, and nothing draws random numbers. A run that goes on from a checkpoint repeats what it would have done.
"""

import json
import math
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from hydra_dist.config import Config
from hydra_dist.config.file import dump_config
from hydra_dist.context import ContextParallel
from hydra_dist.costs.flops import mfu, training_flops_per_token
from hydra_dist.data import Batch
from hydra_dist.errors import RunError
from hydra_dist.model import Transformer, initialize
from hydra_dist.model.explain import explain_layers
from hydra_dist.model.offload import PinnedHost
from hydra_dist.train import checkpoint
from hydra_dist.train.engine import Engine, resolve_precision
from hydra_dist.train.engine_state import EngineState
from hydra_dist.train.evaluate import evaluate, write_evaluation
from hydra_dist.train.mesh import Mesh
from hydra_dist.train.metrics import Metrics, read_metrics
from hydra_dist.train.plots import plot_loss
from hydra_dist.train.preflight import Prepared
from hydra_dist.train.resume import kept_settings
from hydra_dist.train.schedule import learning_rate_factor


class Trainer:
    """One run on one rank."""

    def __init__(self, config: Config, prepared: Prepared, mesh: Mesh) -> None:
        self.config = config
        self.prepared = prepared
        self.mesh = mesh
        self.directory = Path(config.run.directory)
        self.precision = resolve_precision(config, mesh.device)
        self.context = ContextParallel(
            mesh.context,
            strategy=mesh.choice.chosen.strategy,
            layout=config.context.layout,
            timeout=config.context.timeout_seconds,
            inner_ring=mesh.choice.chosen.inner_ring,
        )
        torch.manual_seed(config.train.seed)
        model = Transformer(
            prepared.model,
            activation_checkpointing=config.train.activation_checkpointing,
            loss_chunk_size=config.train.loss_chunk_size,
            mlp_tile_size=config.train.mlp_tile_size,
            offload_to=PinnedHost(mesh.device) if config.train.activation_offload else None,
        )
        initialize(model, config.train.seed)
        self.engine = Engine(model.to(mesh.device), config, mesh, self.precision)
        self.state = EngineState(self.engine.deepspeed)
        self.rows_per_step = mesh.data_size * config.train.micro_batch_size * config.train.gradient_accumulation_steps
        self.step = 0
        if prepared.resume_from is not None:
            checkpoint.load(
                prepared.resume_from,
                self.state,
                expected_model=prepared.model,
                expected_tokenizer=prepared.train.dataset.tokenizer_sha256,
            )
            self.step = prepared.resume_step

    @property
    def tokens_per_step(self) -> int:
        """Over all ranks."""
        return self.rows_per_step * self.config.data.sequence_length

    def run(self) -> None:
        """Train to the last step, save, and evaluate."""
        config = self.config
        if self.mesh.is_first:
            self._write_description()
            with Metrics(
                self.directory,
                self.step,
                config.train.steps,
                log_every_steps=config.run.log_every_steps,
                tensorboard=config.run.tensorboard,
            ) as metrics:
                self._describe(metrics)
                self._run(metrics)
        else:
            self._run(None)

    def _run(self, metrics: Metrics | None) -> None:
        config = self.config
        saved = self.step if self.prepared.resume_from else -1
        while self.step < config.train.steps:
            record = self.train_step()
            if metrics:
                metrics.step(record)
            if _is_due(self.step, config.checkpoint.every_steps):
                self.save()
                saved = self.step
            if _is_due(self.step, config.evaluate.every_steps) and self.step < config.train.steps:
                self.evaluate(metrics)
        if saved != self.step:
            self.save()
        evaluation = self.evaluate(metrics)
        if metrics:
            plot_loss(self.directory / "loss.png", read_metrics(metrics.path), evaluation)

    def train_step(self) -> dict[str, Any]:
        """One update; the step's record, the same on every rank but for memory."""
        started = time.perf_counter()
        batches = [self._place(batch) for batch in self._micro_batches()]
        waited = time.perf_counter() - started
        # The number of targets over all ranks and micro-batches, before the first backward needs it.
        totals = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        totals[0] = sum(int((targets >= 0).sum()) for _, targets, _ in batches)
        dist.all_reduce(totals)
        num_targets = max(1.0, float(totals[0]))
        totals.zero_()
        if self.mesh.context_size > 1:
            self.engine.refresh_logit_bounds()
        for tokens, targets, plan in batches:
            nll = self.engine.forward(tokens, plan, targets=targets)
            self.engine.backward(nll / num_targets)
            totals[1] += nll.detach().double()
        factor = learning_rate_factor(self.config.schedule, self.step, self.config.train.steps)
        grad_norm = self.engine.step(factor)
        dist.all_reduce(totals)
        loss = float(totals[1]) / num_targets
        # Both are the same on every rank, so all of them stop here together, before anything is saved.
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise RunError(
                f"step {self.step}: the loss is {loss} and the gradient norm {grad_norm}; the run stops, and the "
                f"checkpoints in {self.directory / 'checkpoints'} are as they were. A smaller "
                "optimizer.learning_rate, or a longer schedule.warmup_steps, is the usual remedy"
            )
        seconds = time.perf_counter() - started
        record = {
            "step": self.step,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": self.config.optimizer.learning_rate * factor,
            "tokens": (self.step + 1) * self.tokens_per_step,
            "targets": int(num_targets),
            "step_seconds": seconds,
            "data_seconds": waited,
            "tokens_per_second": self.tokens_per_step / seconds,
            **self._memory(),
        }
        if self.mesh.device.type == "cuda":
            flops = training_flops_per_token(self.prepared.model, self.config.data.sequence_length)
            share = mfu(
                flops * record["tokens_per_second"] / self.mesh.world_size,
                torch.cuda.get_device_name(self.mesh.device),
            )
            if share is not None:
                record["mfu"] = share
        self.step += 1
        return record

    def save(self) -> None:
        """Write a checkpoint of the steps done so far; collective."""
        checkpoint.save(
            self.directory / "checkpoints",
            self.step,
            self.state,
            metadata=self._checkpoint_metadata(),
            keep=self.config.checkpoint.keep,
        )

    def evaluate(self, metrics: Metrics | None) -> dict[str, Any] | None:
        """Score the held-out rows and write ``evaluation.json``; collective. None where no document was held out."""
        held_out = self.prepared.held_out
        if held_out is None:
            if metrics:
                metrics.message("no document of this corpus was held out, so nothing is evaluated")
            return None
        self.engine.module.eval()

        def token_nll(tokens: Tensor, plan: Any, targets: Tensor) -> Tensor:
            with torch.no_grad():
                return self.engine.forward(tokens, plan, targets=targets, reduction="none")

        result = evaluate(token_nll, held_out, self.context, self.mesh, self.config.evaluate.max_rows)
        self.engine.module.train()
        result = {"step": self.step, **result}
        if metrics:
            write_evaluation(self.directory / "evaluation.json", result)
            metrics.evaluation(self.step, {"bits_per_byte": result["bits_per_byte"], "loss": result["loss"]})
            metrics.message(
                f"held out after step {self.step}: {result['bits_per_byte']:.3f} bits per byte, "
                f"loss {result['loss']:.3f} over {result['targets']:,} targets"
            )
        return result

    def close(self) -> None:
        """Release the engine."""
        self.engine.close()

    def _micro_batches(self) -> Iterator[Batch]:
        """This data replica's share of the step's rows, one micro-batch at a time.

        Row i of a step is the same row whatever the number of replicas.
        """
        size = self.config.train.micro_batch_size
        for micro in range(self.config.train.gradient_accumulation_steps):
            first = (micro * self.mesh.data_size + self.mesh.data_rank) * size
            yield self.prepared.train.batch(self.step, range(first, first + size), self.rows_per_step)

    def _place(self, batch: Batch) -> tuple[Tensor, Tensor, Any]:
        """Local tokens, local targets and the plan of one micro-batch."""
        plan = self.context.plan(self.config.data.sequence_length, batch.document_starts, device=self.mesh.device)
        tokens, targets = (plan.shard(rows.to(self.mesh.device), dim=1) for rows in (batch.tokens, batch.targets))
        return tokens, targets, plan

    def _memory(self) -> dict[str, Any]:
        if self.mesh.device.type == "cuda":
            return {
                "memory_gib": torch.cuda.max_memory_allocated(self.mesh.device) / 2**30,
                "memory_reserved_gib": torch.cuda.max_memory_reserved(self.mesh.device) / 2**30,
                "memory_metric": "allocated",
            }
        return {"memory_gib": psutil.Process().memory_info().rss / 2**30, "memory_metric": "resident"}

    def _checkpoint_metadata(self) -> dict[str, Any]:
        return {
            "data_step": self.step,
            "world_size": self.mesh.world_size,
            "context_size": self.mesh.context_size,
            "zero_stage": self.config.zero.stage,
            "precision": self.precision,
            "model": self.prepared.model.model_dump(mode="json"),
            "tokenizer_sha256": self.prepared.train.dataset.tokenizer_sha256,
            "extra": kept_settings(self.config, self.mesh.data_size),
        }

    def _write_description(self) -> None:
        shutil.copy(self.prepared.train.dataset.tokenizer_path, self.directory / "tokenizer.json")
        (self.directory / "config.yaml").write_text(dump_config(self.config), encoding="utf-8")
        description = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
            "device": str(self.mesh.device),
            "world_size": self.mesh.world_size,
            "precision": self.precision,
            "optimizer": self.engine.optimizer_in_use,
        }
        (self.directory / "environment.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    def _describe(self, metrics: Metrics) -> None:
        config, mesh = self.config, self.mesh
        parameters = sum(self.state.numel(name) for name in self.state.names)
        metrics.message(
            f"{parameters / 1e6:.2f}M parameters, {self.precision} on {mesh.device.type}, ZeRO stage "
            f"{config.zero.stage}, {mesh.data_size} data x {mesh.context_size} context ranks "
            f"({mesh.choice.chosen.grid}, {config.context.layout}); "
            f"{self.rows_per_step} rows of {config.data.sequence_length:,} tokens a step"
        )
        dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
        if config.context.strategy in ("auto", "hybrid") and mesh.context_size > 1:
            metrics.message(f"context strategy {mesh.choice.chosen.describe()}: {mesh.choice.why}")
        length, over_ranks = config.data.sequence_length, mesh.choice.chosen.ring > 1
        for line in explain_layers(self.prepared.model, mesh.device, dtype, length, over_ranks):
            metrics.message(line)
        if self.step:
            metrics.message(f"going on after step {self.step} from {self.prepared.resume_from}")


def _is_due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0
