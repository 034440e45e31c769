"""Every setting of attention, alone and together with every other: the model builds, learns and generates."""

import itertools

import pytest
import torch

from hydra_dist.context import ContextParallel, run_ranks
from hydra_dist.costs.parameters import count_parameters
from hydra_dist.model import Transformer, generate, initialize

ALONE = [
    {"attention": "gqa"},
    {"compression_factor": 3, "num_query_heads": None, "num_key_heads": None},
    {"query_compression": 1, "key_compression": 3, "num_query_heads": None, "num_key_heads": None},
    {"num_key_heads": 1},
    {"conv_kernel_sizes": (4, 3)},
    {"conv_kernel_sizes": (1, 1)},
    {"use_convs": False},
    {"use_qk_mean": False},
    {"use_qk_norm": False},
    {"use_value_shift": False},
    {"temperature": "raw"},
    {"temperature": "exp_clamp"},
    {"use_output_norm": True},
    {"window": 3},
    {"layer_windows": (3, None)},
    {"rope_fraction": 0.0},
    {"induction_layers": (0,)},
    {"layer_settings": [{"layers": [1], "compression_factor": 3, "conv_kernel_sizes": (1, 3), "window": 5}]},
    {"layer_settings": [{"layers": [1], "attention": "gqa", "num_key_heads": 1}]},
    {"layer_settings": [{"layers": [1], "use_output_norm": True, "temperature": "raw", "use_convs": False}]},
]


def brings_no_row_before(changes):
    """Then no layer can start as an induction head."""
    return (
        changes.get("attention") == "gqa"
        or changes.get("use_convs") is False
        or changes.get("conv_kernel_sizes") == (1, 1)
    )


def pairs():
    for one, other in itertools.combinations(ALONE, 2):
        if any(one[key] != other[key] for key in one.keys() & other.keys()):
            continue
        both = {**one, **other}
        if not (both.get("induction_layers") and brings_no_row_before(both)):
            yield both


def step(model, tokens):
    """Losses before and after a small step against the gradient."""
    targets = tokens.roll(-1, 1)
    loss = model(tokens, targets=targets) / tokens.numel()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.02 * parameter.grad / norm
        return float(loss.detach()), float(model(tokens, targets=targets) / tokens.numel())


def check(config, start=initialize):
    model = Transformer(config)
    start(model, 0)
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())
    tokens = torch.randint(0, 37, (1, 12), generator=torch.Generator().manual_seed(3))
    before, after = step(model, tokens)
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert after < before < 10
    continued = generate(model, tokens[:, :4], 3, temperature=0.0)
    with torch.no_grad():
        likeliest = model(continued[:, :-1]).argmax(-1)
    assert torch.equal(continued[:, 4:], likeliest[:, 3:])


@pytest.mark.parametrize("changes", [{}, *ALONE], ids=str)
def test_alone(changes, model_config):
    check(model_config(**changes))


def test_pairwise(model_config):
    tried = list(pairs())
    assert len(tried) > 150
    for changes in tried:
        try:
            check(model_config(**changes))
        except Exception as error:
            raise AssertionError(f"with {changes}: {error}") from error


def test_the_check_above_sees_a_parameter_without_a_gradient(model_config):
    """exp_clamp from a tau of 0, which lies below the clamp's lower edge."""

    def start(model, seed):
        initialize(model, seed)
        for layer in model.layers:
            layer.attention.prologue.tau.data.zero_()

    check(model_config(), start)
    with pytest.raises(AssertionError, match="tau"):
        check(model_config(temperature="exp_clamp"), start)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_layers_of_different_shapes_over_ranks(layout, model_config, relative_error):
    """Each layer asks for the rows before its chunks that its own convolutions read, and sends its own keys."""
    entries = [
        {"layers": [0], "conv_kernel_sizes": (4, 3), "compression_factor": 1, "use_output_norm": True},
        {"layers": [1], "attention": "gqa", "num_key_heads": 1},
        {"layers": [2], "use_convs": False, "temperature": "raw", "window": 7},
    ]
    config = model_config(num_layers=4, layer_settings=entries)
    tokens = torch.randint(0, 37, (1, 40))
    targets = tokens.roll(-1, 1)

    def one_rank(mesh):
        model = Transformer(config)
        initialize(model, 0)
        model.double()
        seq = ContextParallel(mesh, layout=layout).plan(40)
        loss = model(seq.shard(tokens, 1), seq, targets=seq.shard(targets, 1))
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    loss, gradients = one_rank(None)
    ranks = run_ranks(2, one_rank, timeout=60)
    assert relative_error(sum(rank[0] for rank in ranks), loss) < 1e-12
    for name, gradient in gradients.items():
        assert relative_error(sum(rank[1][name] for rank in ranks), gradient) < 1e-11, name
