"""Layers under torch.compile: one graph each, the same numbers, and no ring that runs again."""

import pytest
import torch

from hydra_dist.context import ContextParallel, run_ranks
from hydra_dist.model import Transformer, initialize

LENGTH = 32


def plan(context, begin):
    starts = torch.zeros(1, LENGTH, dtype=torch.long)
    starts[:, begin:] = begin
    return context.plan(LENGTH, starts)


def step(model, seq):
    """Loss and all gradients."""
    model.zero_grad()
    tokens = (torch.arange(LENGTH) * 7 % 37).unsqueeze(0)
    loss = model(seq.shard(tokens, 1), seq, targets=seq.shard(tokens.roll(-1, 1), 1))
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def models(config, **options):
    pair = [Transformer(config, **options) for _ in range(2)]
    for model in pair:
        initialize(model, 0)
    return pair


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("checkpointing", ["none", "layer"])
@pytest.mark.parametrize("attention", ["ccgqa", "gqa"])
def test_compiled_layers_train_alike_and_are_traced_once_for_many_plans(
    attention, checkpointing, model_config, relative_error
):
    config = model_config(num_layers=4, layer_windows=[5, None], attention=attention)
    plain, compiled = models(config, activation_checkpointing=checkpointing)
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled.compile_layers(backend=backend)
    context = ContextParallel()
    for begin in (3, 9, 20, 31):
        seq = plan(context, begin)
        for a, b in zip(step(compiled, seq), step(plain, seq), strict=True):
            assert relative_error(a, b) < 1e-5
    # Two kinds of layers, each with the first plan's handle as a constant and then with any handle.
    assert len(traced) <= 4


def test_checkpointing_sends_no_keys_again(model_config):
    """A halo is sent again with the prologue that it hides behind, in two messages a layer."""
    config = model_config(num_layers=1)

    def one_rank(mesh):
        sent = []
        for options in ({"activation_checkpointing": "none"}, {"activation_checkpointing": "layer"}):
            (model, _) = models(config, **options)
            model.compile_layers(backend="aot_eager")
            seq = plan(ContextParallel(mesh), 9)
            step(model, seq)
            sent.append(seq.stats())
        return sent

    for without, with_checkpointing in run_ranks(2, one_rank, timeout=300):
        assert with_checkpointing["backward"] == without["backward"]
        before, after = (sent["forward"]["kinds"] for sent in (without, with_checkpointing))
        assert after["keys"] == before["keys"]
        assert before["keys"]["messages"] > 0
        assert after["halo"]["messages"] == 2 * before["halo"]["messages"]


@pytest.mark.parametrize(("strategy", "ranks"), [("all_gather", (2, 1)), ("hybrid", (2, 2))])
def test_compiled_layers_over_ranks_train_alike(strategy, ranks, model_config, relative_error):
    """Plans with other documents, so that the exchange of heads is traced with a handle that changes."""
    config = model_config(num_layers=1)

    def one_rank(mesh):
        plain, compiled = models(config)
        compiled.compile_layers(backend="aot_eager")
        context = ContextParallel(mesh, strategy)
        errors = []
        for begin in (3, 20, 31):
            seq = plan(context, begin)
            pairs = zip(step(compiled, seq), step(plain, seq), strict=True)
            errors += [relative_error(a, b) for a, b in pairs]
        return max(errors)

    assert max(run_ranks(ranks, one_rank, timeout=300)) < 1e-5


def test_a_graph_break_is_an_error(model_config):
    _, model = models(model_config(num_layers=1))
    forward = model.layers[0].mlp.forward

    def with_a_break(x):
        torch._dynamo.graph_break()
        return forward(x)

    model.layers[0].mlp.forward = with_a_break
    model.compile_layers(backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        step(model, plan(ContextParallel(), 9))
