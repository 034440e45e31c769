"""One CCGQA layer over emulated ranks: output, the gradient of the input and of every parameter as on one device."""

import copy

import pytest
import torch

from hydra_dist.context import ContextParallel, SequencePlan, run_ranks
from hydra_dist.context.halo import HaloExchange
from hydra_dist.errors import ConfigError
from hydra_dist.model import CCGQA

GRIDS = {
    # strategy: ((ring, ulysses), ranks of an inner ring)
    "ring": ((4, 1), None),
    "ring of rings": ((4, 1), 2),
    "all_gather": ((4, 1), None),
    "ulysses": ((1, 4), None),
    "hybrid": ((2, 2), None),
}
LAYOUTS = ("contiguous", "zigzag", "balanced")
DOCUMENTS = {"one document": None, "documents": ((0, 1, 9, 30), (0, 8, 16, 17, 18, 40))}


def layer_of(randomize, **options):
    settings = {"num_query_heads": 4, "num_key_heads": 2, "head_dim": 8, "conv_kernel_sizes": (2, 3), **options}
    return randomize(CCGQA(16, **settings).double())


def starts_of(documents, length):
    if documents is None:
        return None
    starts = torch.zeros(len(documents), length, dtype=torch.int64)
    for row, positions in enumerate(documents):
        for position in positions:
            starts[row, position:] = position
    return starts


def tensors(length):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, 16, generator=generator, dtype=torch.float64) for _ in range(2)]


def run(layer, seq, local):
    """Output, the gradient of the input, and those of the parameters."""
    x, grad = (tensor.clone() for tensor in local)
    layer = copy.deepcopy(layer)
    y = layer(x.requires_grad_(), seq)
    y.backward(grad)
    return [y.detach(), x.grad], [parameter.grad for parameter in layer.parameters()]


def largest_error(layer, relative_error, grid, strategy, layout, inner, starts, length, dealing=None):
    x, grad = tensors(length)

    def one_rank(mesh):
        seq = ContextParallel(mesh, strategy, layout, inner_ring=inner).plan(length, starts, dealing=dealing)
        rows, parameters = run(layer, seq, [seq.shard(x, 1), seq.shard(grad, 1)])
        return [seq.unshard(part, 1) for part in rows], parameters

    results = run_ranks(grid, one_rank)
    summed = [sum(parts) for parts in zip(*(parameters for _, parameters in results), strict=True)]
    rows, parameters = run(layer, ContextParallel().plan(length, starts), [x, grad])
    return max(relative_error(a, b) for a, b in zip([*results[0][0], *summed], [*rows, *parameters], strict=True))


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", GRIDS)
def test_strategies_and_layouts(name, layout, documents, randomize, relative_error):
    grid, inner = GRIDS[name]
    starts = starts_of(DOCUMENTS[documents], 45)
    strategy = "ring" if name == "ring of rings" else name
    error = largest_error(layer_of(randomize), relative_error, grid, strategy, layout, inner, starts, 45)
    assert error < 1e-12


@pytest.mark.parametrize("documents", [None, ((0, 1, 9), (0, 8, 16, 17))])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "strategy,grid", [("ring", (8, 1)), ("all_gather", (8, 1)), ("ulysses", (1, 4)), ("hybrid", (4, 2))]
)
def test_shards_shorter_than_the_halo(strategy, grid, layout, documents, randomize, relative_error):
    # A halo of 6 rows before chunks of 1 to 5.
    layer = layer_of(randomize, conv_kernel_sizes=(4, 4))
    starts = starts_of(documents, 19)
    assert largest_error(layer, relative_error, grid, strategy, layout, None, starts, 19) < 1e-12


@pytest.mark.parametrize("documents", [None, ((0, 511, 512, 513), (0, 512))])
@pytest.mark.parametrize("strategy,grid", [("ring", (3, 1)), ("all_gather", (3, 1))])
def test_a_rank_with_one_row(strategy, grid, documents, randomize, relative_error):
    dealing = [[range(512)], [range(512, 513)], [range(513, 1024)]]
    layer, starts = layer_of(randomize), starts_of(documents, 1024)
    assert largest_error(layer, relative_error, grid, strategy, "zigzag", None, starts, 1024, dealing) < 1e-12


@pytest.mark.parametrize("options", [{"window": 7}, {"num_key_heads": 1}, {"num_key_heads": 4}, {"use_qk_norm": False}])
@pytest.mark.parametrize("name", GRIDS)
def test_kinds_of_layers(name, options, randomize, relative_error):
    grid, inner = GRIDS[name]
    starts = starts_of(DOCUMENTS["documents"], 45)
    strategy = "ring" if name == "ring of rings" else name
    layer = layer_of(randomize, **options)
    assert largest_error(layer, relative_error, grid, strategy, "zigzag", inner, starts, 45) < 1e-12


@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
def test_striped_rows_work_where_nothing_reads_the_row_before(strategy, randomize, relative_error):
    starts = starts_of(DOCUMENTS["documents"], 45)
    layer = layer_of(randomize, use_convs=False, use_value_shift=False)
    assert largest_error(layer, relative_error, (4, 1), strategy, "striped", None, starts, 45) < 1e-12
    with pytest.raises(ConfigError, match=r"context\.layout striped: .*zigzag, contiguous or balanced works"):
        largest_error(layer_of(randomize), relative_error, (4, 1), strategy, "striped", None, starts, 45)


def in_another_order(self, tensors, num_chunks):
    finish = right_gather(self, tensors, num_chunks)
    return lambda: [rows.flip(2) for rows in finish()]


def to_the_next_rows(self, grads):
    finish = right_scatter(self, grads)
    return lambda: [(rows, sums.roll(1, 1)) for rows, sums in finish()]


right_gather, right_scatter = HaloExchange.begin_gather, HaloExchange.begin_scatter


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(
    "owner,what,wrong",
    [
        (HaloExchange, "begin_gather", in_another_order),
        (HaloExchange, "begin_scatter", to_the_next_rows),
        (SequencePlan, "ages", property(lambda self: None, lambda self, value: None)),
    ],
    ids=["halo in another order", "gradients to other rows", "convolutions over documents"],
)
def test_the_comparison_rejects_wrong_halos(name, owner, what, wrong, randomize, relative_error, monkeypatch):
    grid, inner = GRIDS[name]
    starts = starts_of(((0, 11, 22, 33),) * 2, 45)  # where the ranks' rows begin
    strategy = "ring" if name == "ring of rings" else name
    arguments = (layer_of(randomize), relative_error, grid, strategy, "contiguous", inner, starts, 45)
    chosen = arguments if what == "ages" else (*arguments[:-2], None, 45)
    assert largest_error(*chosen) < 1e-12
    monkeypatch.setattr(owner, what, wrong, raising=False)
    assert largest_error(*chosen) > 1e-3
