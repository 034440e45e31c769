"""The scale benchmark on a few rows, and verdicts that can be no."""

import dataclasses

import pytest
import torch

from benchmarks import context_scale, context_scale_gpu
from benchmarks.harness import Options
from benchmarks.tensor_memory import TensorMemory
from benchmarks.uncounted import uncounted
from hydra_dist.config.file import load_config
from hydra_dist.context import ContextParallel, run_ranks
from hydra_dist.costs.parameters import count_parameters

SMALL = {"ranks": "4,8", "rows": 32, "ulysses_heads": 8, "last_keys": 40}


def options(module, **settings):
    return Options(device="cpu", settings={**module.SETTINGS, **settings}, say=lambda text: None)


@pytest.fixture
def small():
    return options(context_scale, **SMALL)


def test_a_small_ring_is_exact_and_no_larger_over_more_ranks(small):
    result = context_scale.run(small)
    assert result.holds, result.finding
    found = {(row[0], row[1]): dict(zip(result.table.columns, row, strict=True)) for row in result.table.rows}
    assert set(found) == {(strategy, ranks) for strategy in context_scale.STRATEGIES for ranks in (4, 8)}
    assert found["ring", 8]["growth"] <= 1.01
    assert found["ulysses", 8]["growth"] <= 1.05
    assert found["all_gather", 8]["growth"] > 1.2
    assert found["ring", 8]["tokens"] == 8 * 32
    assert len(result.quantities["peak bytes, ring, 8 ranks"].raw) == 8


def changed(measured, **values):
    return [dataclasses.replace(rank, **{name: value(rank) for name, value in values.items()}) for rank in measured]


def with_rows(index, change):
    """A change to what each sampled position has of the output (0) or of the gradients of q, k and v."""

    def values(rank):
        return {
            position: tuple(change(x) if i == index else x for i, x in enumerate(tensors))
            for position, tensors in rank.rows.items()
        }

    return {"rows": values}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"peak_bytes": lambda rank: 2 * rank.peak_bytes}, "times the bytes"),
        (
            {"sent": lambda rank: dataclasses.replace(rank.sent, forward_bytes=rank.sent.forward_bytes + 1)},
            "is NOT the",
        ),
        (with_rows(0, lambda x: x * 1.001), "by 1.0e-03 of the row"),
        (with_rows(1, lambda x: x * 1.001), "gradients by 1.0e-03"),
        (with_rows(2, lambda x: x * 1.001), "gradients by 1.0e-03"),
        (with_rows(3, lambda x: x * torch.nan), "gradients by inf"),
    ],
    ids=["memory", "bytes", "output", "q", "k", "v"],
)
def test_what_is_wrong_does_not_hold(small, monkeypatch, wrong, words):
    measure = context_scale.measure

    def changed_where_sampled(strategy, ranks, inputs, positions):
        measured = measure(strategy, ranks, inputs, positions)
        return changed(measured, **wrong) if positions else measured

    monkeypatch.setattr(context_scale, "measure", changed_where_sampled)
    result = context_scale.run(small)
    assert not result.holds
    assert words in result.finding


def test_plain_rows_and_keys_are_those_of_autograd():
    q, k, v, grad = (x.double().requires_grad_() for x in context_scale.random_inputs(20, 2, 4))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2
    hidden = torch.ones(20, 20, dtype=torch.bool).triu(1)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
    out.backward(grad.detach())
    inputs = [x.detach() for x in (q, k, v, grad)]
    for position, (row, rise) in zip((1, 7, 19), context_scale.plain_rows(inputs, (1, 7, 19)), strict=True):
        torch.testing.assert_close(row, out[0, position].detach(), rtol=0, atol=1e-14)
        torch.testing.assert_close(rise, q.grad[0, position], rtol=0, atol=1e-14)
    for position, rises in zip((5, 18), context_scale.plain_key_gradients(inputs, (5, 18)), strict=True):
        torch.testing.assert_close(rises[0], k.grad[0, position], rtol=0, atol=1e-14)
        torch.testing.assert_close(rises[1], v.grad[0, position], rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(3, 1), (1, 3)])
def test_messages_count_for_no_rank_and_arrive_all_the_same(shape):
    x = torch.randn(1, 30, 3, 8)

    def one_rank(mesh, exchanged):
        context = ContextParallel(uncounted(mesh) if exchanged else mesh, "ring" if shape[0] > 1 else "ulysses")
        seq = context.plan(30)
        q = seq.shard(x, 1)
        with TensorMemory() as memory:
            out = seq.attention(q, q, q)
        return out, memory.num_storages

    for (out, storages), (same, fewer) in zip(
        run_ranks(shape, lambda mesh: one_rank(mesh, False)),
        run_ranks(shape, lambda mesh: one_rank(mesh, True)),
        strict=True,
    ):
        assert torch.equal(out, same)
        assert fewer < storages


@pytest.fixture
def gpu_small():
    shape = {"sequence_length": 512, "ranks": 4, "head_dim": 32, "rounds": 2, "least_of_kernel": 0.0}
    return options(context_scale_gpu, **shape)


def test_the_ring_of_the_gpu_row_is_compared_with_the_kernel(gpu_small, monkeypatch):
    quantities, ratio, _ = context_scale_gpu.ring_against_kernel(gpu_small)
    ring, kernel = (quantities[f"{name}, seconds"].raw for name in ("ring", "one kernel"))
    assert ratio.raw == pytest.approx([b / a for a, b in zip(ring, kernel, strict=True)])
    monkeypatch.setattr(context_scale_gpu, "LARGEST_DIFFERENCE", 1e-6)
    with pytest.raises(context_scale_gpu.RunError, match="the ring differs from the kernel by"):
        context_scale_gpu.ring_against_kernel(gpu_small)


def test_the_step_of_the_gpu_row_is_of_a_model_that_is_large_enough(monkeypatch):
    asked = {}

    class Done:
        steps = ({"grad_norm": 1.5},)

        def column(self, key):
            return {"tokens_per_second": [1e4], "loss": [9.0], "memory_gib": [70.0]}[key]

    def train(config, overrides, processes, device):
        asked.update(overrides)
        return Done()

    monkeypatch.setattr(context_scale_gpu, "train", train)
    stated = Options(device="cuda", settings=context_scale_gpu.SETTINGS, say=lambda text: None)
    quantities, holds, cells = context_scale_gpu.train_a_step(stated)
    assert holds
    assert quantities["seconds of a step"].median == pytest.approx(2**20 / 1e4)
    assert "70.0 GiB allocated" in cells[1]
    config = load_config("configs/long_context.yaml", [f"{key}={value}" for key, value in asked.items()])
    assert config.train.activation_offload
    assert config.train.activation_checkpointing == "layer"
    assert config.train.mlp_tile_size == 16384
    assert config.model.attention == "ccgqa"
    assert config.data.sequence_length == 2**20
    assert count_parameters(config.model.model_copy(update={"vocab_size": 8192})).total >= 10**9
    Done.steps = ({"grad_norm": float("nan")},)
    assert not context_scale_gpu.train_a_step(stated)[1]
    Done.steps = ({"grad_norm": 1.5},)
    fewer = {**context_scale_gpu.SETTINGS, "num_layers": 6}
    assert not context_scale_gpu.train_a_step(dataclasses.replace(stated, settings=fewer))[1]


def test_rows_are_measured_only_as_they_are_stated(monkeypatch, gpu_small):
    done = ({}, context_scale_gpu.Samples.of([1.0], "1"), ("ring", "fast"))
    monkeypatch.setattr(context_scale_gpu, "ring_against_kernel", lambda options: done)
    monkeypatch.setattr(context_scale_gpu, "train_a_step", lambda options: ({}, True, ("step", "done")))
    assert context_scale_gpu.run(options(context_scale_gpu, rounds=9)).rows == tuple(context_scale_gpu.GPU_ROWS)
    assert context_scale_gpu.run(gpu_small).rows == ()
    slow = options(context_scale_gpu, least_of_kernel=1.1)
    assert not context_scale_gpu.run(slow).holds
