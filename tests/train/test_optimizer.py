"""Muon on whole matrices and on ZeRO's flat slices of them."""

import pytest
import torch
import torch.distributed as dist

from hydra_dist.config import ModelConfig, OptimizerConfig
from hydra_dist.model import Transformer
from hydra_dist.train import optimizer as module
from hydra_dist.train.optimizer import Muon, build_optimizer, orthogonalise

SHAPES = [(8, 3), (3, 8), (5, 5), (1, 7)]
SETTINGS = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "shapes": SHAPES}


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def whole_steps(num_steps):
    """The matrices after some updates, without ZeRO; a bias in a group of its own."""
    matrices = [torch.nn.Parameter(g.clone()) for g in gradients(100)]
    bias = torch.nn.Parameter(torch.ones(4))
    muon = Muon([{"params": matrices, **SETTINGS}, {"params": [bias], "weight_decay": 0.0}], None, lr=0.01)
    for step in range(num_steps):
        for p, g in zip(matrices, gradients(step), strict=True):
            p.grad = g
        bias.grad = torch.full((4,), 0.5)
        muon.step()
    return torch.cat([m.detach().flatten() for m in matrices]), bias.detach()


def slice_steps(num_steps, num_ranks, monkeypatch):
    """The same from flat slices, the ranks played one after another: each gather is given what all ranks sent."""
    flat = torch.cat([g.flatten() for g in gradients(100)])
    size = -(-flat.numel() // num_ranks)
    padded = torch.nn.functional.pad(flat, (0, size * num_ranks - flat.numel()))
    slices = [torch.nn.Parameter(part.clone()) for part in padded.split(size)]
    ranks = [Muon([{"params": [part], **SETTINGS}], None, lr=0.01) for part in slices]
    moments = [torch.zeros(size) for _ in range(num_ranks)]
    for step in range(num_steps):
        grad = torch.nn.functional.pad(
            torch.cat([g.flatten() for g in gradients(step)]), (0, padded.numel() - flat.numel())
        )
        sent = []
        for part, moment in zip(grad.split(size), moments, strict=True):
            moment.lerp_(part, 1 - SETTINGS["momentum"])
            sent.append(part.lerp(moment, SETTINGS["momentum"]).bfloat16())
        for rank, (muon, part, g) in enumerate(zip(ranks, slices, grad.split(size), strict=True)):
            part.grad = g.clone()
            monkeypatch.setattr(dist, "get_world_size", lambda group: num_ranks)
            monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
            monkeypatch.setattr(
                dist,
                "all_gather",
                lambda out, x, group, sent=sent: [o.copy_(s) for o, s in zip(out, sent, strict=True)],
            )
            muon.step()
    return torch.cat([part.detach() for part in slices])[: flat.numel()]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_slices_move_as_whole_matrices_do(num_ranks, monkeypatch):
    whole, _ = whole_steps(3)
    torch.testing.assert_close(slice_steps(3, num_ranks, monkeypatch), whole, rtol=0, atol=1e-6)


def test_the_check_above_rejects_matrices_read_at_the_wrong_place(monkeypatch):
    whole, _ = whole_steps(3)
    monkeypatch.setitem(SETTINGS, "shapes", SHAPES[::-1])
    assert (slice_steps(3, 2, monkeypatch) - whole).abs().max() > 1e-3


def test_singular_values_end_near_one():
    generator = torch.Generator().manual_seed(0)
    for shape in ((64, 16), (16, 64), (200, 40)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=generator)).float())
        assert 0.5 < values.min() <= values.max() < 1.3
    assert orthogonalise(torch.zeros(4, 4)).abs().max() == 0


def test_other_groups_are_plain_adamw():
    _, bias = whole_steps(3)
    plain = torch.nn.Parameter(torch.ones(4))
    adamw = torch.optim.AdamW([plain], lr=0.01, weight_decay=0.0)
    for _ in range(3):
        plain.grad = torch.full((4,), 0.5)
        adamw.step()
    assert torch.equal(bias, plain.detach())


def test_only_linear_layers_of_the_blocks_are_matrices():
    model = Transformer(ModelConfig(vocab_size=11, num_layers=1, hidden_size=16, head_dim=8))
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(name="muon", weight_decay=0.5), None)
    assert {names[id(p)] for p in optimizer.param_groups[0]["params"]} == {
        f"layers.0.{name}.weight" for name in ("attention.down", "attention.output", "mlp.gate_up", "mlp.down")
    }
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert "layers.0.attention.convs.depthwise_weight" not in decayed
    assert "embedding.weight" not in decayed
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_the_iteration_has_the_published_coefficients():
    assert module.NEWTON_SCHULZ == (3.4445, -4.7750, 2.0315)
