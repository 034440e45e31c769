"""The model, its ranks and a whole run on one GPU, against the CPU's numbers."""

import pytest
import torch
import yaml

from hydra_dist.config import ModelConfig
from hydra_dist.context import ContextParallel, run_ranks
from hydra_dist.model import Transformer, chunked_cross_entropy, initialize
from hydra_dist.train.metrics import read_metrics

CONFIG = ModelConfig(vocab_size=61, num_layers=2, hidden_size=64, head_dim=16, num_query_heads=4, num_key_heads=2)
LENGTH = 256


def rows():
    generator = torch.Generator().manual_seed(0)
    stream = torch.randint(61, (1, LENGTH + 1), generator=generator)
    starts = torch.where(torch.arange(LENGTH) < 100, 0, 100).expand(1, LENGTH)
    return stream[:, :-1], stream[:, 1:], starts


def gradients(device, num_ranks):
    """Loss and parameter gradients of one step, summed over emulated ranks, in fp32 on the CPU."""
    tokens, targets, starts = rows()

    def one_rank(mesh):
        model = Transformer(CONFIG, loss_chunk_size=64)
        initialize(model, seed=0)
        model.to(device)
        plan = ContextParallel(mesh).plan(LENGTH, starts, device=torch.device(device))
        local = [plan.shard(x.to(device), dim=1) for x in (tokens, targets)]
        loss = model(local[0], plan, targets=local[1])
        loss.backward()
        return loss.detach().cpu(), [p.grad.cpu() for p in model.parameters()]

    results = [one_rank(None)] if num_ranks == 1 else run_ranks(num_ranks, one_rank, device=device)
    return sum(loss for loss, _ in results), [sum(parts) for parts in zip(*(g for _, g in results), strict=True)]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_step_on_the_gpu_is_the_cpus(num_ranks):
    loss, found = gradients("cuda", num_ranks)
    expected_loss, expected = gradients("cpu", 1)
    assert abs(loss / expected_loss - 1) < 1e-5
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_in_chunks(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 50, 32, generator=generator).to("cuda", dtype).requires_grad_()
    weight = torch.randn(61, 32, generator=generator).to("cuda", dtype).requires_grad_()
    targets = torch.randint(61, (2, 50), generator=generator).to("cuda")
    loss = chunked_cross_entropy(x, weight, targets, chunk_size=16)
    loss.backward()
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = torch.nn.functional.cross_entropy(
        (wide_x @ wide_weight.t()).flatten(0, 1), targets.flatten(), reduction="sum"
    )
    expected.backward()
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert abs(loss.double() / expected - 1) < bound
    for a, b in ((x.grad, wide_x.grad), (weight.grad, wide_weight.grad)):
        assert (a - b).abs().max() <= bound * b.abs().max()


@pytest.mark.parametrize(
    ("precision", "stage"), [("fp32", 1), ("bf16", 1), ("bf16", 2), ("bf16", 3), ("bf16_autocast", 0)]
)
def test_a_run_learns_and_resumes(torchrun, tiny_settings, tmp_path, precision, stage):
    tiny_settings["train"] |= {"device": "cuda", "precision": precision, "steps": 12}
    tiny_settings |= {"zero": {"stage": stage}, "checkpoint": {"every_steps": 6}, "optimizer": {"learning_rate": 1e-2}}
    config = tmp_path / "gpu.yaml"
    config.write_text(yaml.safe_dump(tiny_settings))
    for steps in (8, 12):
        done = torchrun(
            1, "-m", "hydra_dist.train", str(config), f"train.steps={steps}", env={"DS_ACCELERATOR": "cuda"}
        )
        assert done.returncode == 0, done.stdout + done.stderr
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(12))
    assert records[-1]["loss"] < records[0]["loss"] - 0.3
