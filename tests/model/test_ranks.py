"""The whole model over emulated ranks: loss and every parameter's gradient, summed over ranks, as on one device."""

import threading

import pytest
import torch

from hydra_dist.context import ContextParallel, run_ranks
from hydra_dist.context.halo import HaloExchange
from hydra_dist.model import Transformer, initialize, prologue_plain

LENGTH = 45  # over 4 ranks and 8 pieces: chunks of 5 and 6 rows
STARTS = torch.tensor([[0] * 7 + [7] + [8] * 14 + [22] * 23, [0] * 40 + [40] * 5])


def model_of(config, **options):
    model = Transformer(config, loss_chunk_size=4, **options)
    initialize(model, 3)
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "tau")):  # start at zero, where they would hide mistakes
                parameter.copy_(torch.linspace(-1, 1, parameter.numel(), dtype=torch.float64).view(parameter.shape))
    return model


def batch():
    tokens = torch.randint(0, 37, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    targets[1, 10:20] = -100
    return tokens[:, :-1], targets


def step(config, mesh, layout, starts, plan_of=lambda plan: plan, **options):
    tokens, targets = batch()
    model = model_of(config, **options)
    seq = ContextParallel(mesh, layout=layout).plan(LENGTH, starts)
    local = (seq.shard(tokens, 1), seq.shard(targets, 1))
    loss = model(local[0], plan_of(seq), targets=local[1])
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def largest_error(config, ranks, layout, starts, relative_error, **options):
    expected = step(config, None, layout, starts)
    results = run_ranks(ranks, lambda mesh: step(config, mesh, layout, starts, **options), timeout=60)
    summed = [sum(parts) for parts in zip(*results, strict=True)]
    return max(relative_error(a, b) for a, b in zip(summed, expected, strict=True))


@pytest.mark.parametrize("starts", [None, STARTS], ids=["one document", "documents"])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_layouts(ranks, layout, starts, model_config, relative_error):
    assert largest_error(model_config(), ranks, layout, starts, relative_error) < 1e-10


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "gqa"},
        {"window": 6},
        {"conv_kernel_sizes": (4, 4)},  # a halo of 6 rows, longer than the chunks
        {"conv_kernel_sizes": (1, 1)},
        {"use_convs": False},
        {"use_convs": False, "use_value_shift": False},
        {"use_value_shift": False},
        {"num_key_heads": 1},
        {"num_query_heads": 3, "num_key_heads": 3},
    ],
    ids=str,
)
def test_kinds_of_layers(changes, model_config, relative_error):
    assert largest_error(model_config(**changes), 4, "zigzag", STARTS, relative_error) < 1e-10


def test_with_checkpointing(model_config, relative_error):
    options = {"activation_checkpointing": "layer"}
    assert largest_error(model_config(), 4, "zigzag", STARTS, relative_error, **options) < 1e-10


class Changed:
    """A plan with something about it wrong."""

    def __init__(self, plan, **changes):
        self.__dict__.update({"plan": plan, **changes})

    def __getattr__(self, name):
        return getattr(self.plan, name)


class WithoutHalo(Changed):
    halo_handle = None

    def halo(self, parts):
        return [torch.zeros_like(rows) for rows in self.plan.halo(parts)]


@pytest.mark.parametrize(
    "wrong",
    [
        WithoutHalo,
        lambda plan: Changed(plan, positions=torch.arange(len(plan.positions))),
        lambda plan: Changed(plan, ages=None),
    ],
    ids=["no halo", "local positions", "no documents in the convolutions"],
)
def test_the_comparison_rejects_wrong_plans(wrong, model_config, relative_error):
    config = model_config()
    assert largest_error(config, 2, "zigzag", STARTS, relative_error, plan_of=wrong) > 1e-4


def test_the_comparison_rejects_halos_that_do_not_arrive(model_config, relative_error, monkeypatch):
    gather, scatter = HaloExchange.begin_gather, HaloExchange.begin_scatter

    def late(self, tensors, num_chunks):
        finish = gather(self, tensors, num_chunks)
        return lambda: [torch.zeros_like(rows) for rows in finish()]

    def lost(self, grads):
        finish = scatter(self, grads)
        return lambda: [(rows, torch.zeros_like(sums)) for rows, sums in finish()]

    for name, wrong in (("begin_gather", late), ("begin_scatter", lost)):
        with monkeypatch.context() as patch:
            patch.setattr(HaloExchange, name, wrong)
            assert largest_error(model_config(), 2, "zigzag", STARTS, relative_error) > 1e-4


def test_halos_travel_while_rows_are_computed(model_config, monkeypatch):
    """A layer's halo is sent before its prologue computes and waited for before the first rows are, forward; backward,
    the first rows come first, then their gradients travel while everything else is computed."""
    events = {}

    def note(event):
        events.setdefault(threading.get_ident(), []).append(event)

    def noted(begin):
        def begun(*args):
            note("send")
            finish = begin(*args)
            return lambda: (note("wait"), finish())[1]

        return begun

    for name in ("begin_gather", "begin_scatter"):
        monkeypatch.setattr(HaloExchange, name, noted(getattr(HaloExchange, name)))
    for name in ("forward", "backward"):
        compute = getattr(prologue_plain, name)
        monkeypatch.setattr(prologue_plain, name, lambda *args, c=compute: (note(f"{args[-5][0]} rows"), c(*args))[1])
    config = model_config(num_layers=1, conv_kernel_sizes=(2, 2))
    run_ranks(2, lambda mesh: step(config, mesh, "contiguous", None), timeout=60)
    assert len(events) == 2
    for rank in events.values():
        rows = rank[1]
        assert rank == ["send", rows, "wait", "2 rows", "2 rows", "send", rows, "wait"]
        assert rows in ("22 rows", "23 rows")


def test_ranks_lose_no_more_in_fp32_than_one_device(model_config, relative_error):
    config = model_config()
    tokens, targets = batch()

    def run(mesh):
        model = model_of(config).float()
        seq = ContextParallel(mesh).plan(LENGTH, STARTS)
        loss = model(seq.shard(tokens, 1), seq, targets=seq.shard(targets, 1))
        loss.backward()
        return [loss.detach().double(), *(parameter.grad.double() for parameter in model.parameters())]

    exact = step(config, None, "zigzag", STARTS)
    summed = [sum(parts) for parts in zip(*run_ranks(4, run, timeout=60), strict=True)]
    for ours, alone, expected in zip(summed, run(None), exact, strict=True):
        assert relative_error(ours, expected) < 2 * relative_error(alone, expected) + 2e-6
