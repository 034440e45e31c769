"""CCGQA against transformers' ZAYA layer, the released form of it: queries, keys, values, outputs and gradients."""

import itertools

import pytest
import torch
from torch import nn
from transformers import ZayaConfig
from transformers.models.zaya.modeling_zaya import ZayaAttention, ZayaForCausalLM, ZayaRotaryEmbedding

from hydra_dist.config import ModelConfig
from hydra_dist.model import CCGQA
from hydra_dist.model.interop.rules import to_ours, to_theirs
from hydra_dist.model.interop.zaya import attention_rules
from hydra_dist.model.rope import rope_tables

ROWS, HIDDEN = 11, 24
HEADS = [(2, 2, 8), (4, 2, 8), (4, 1, 8), (8, 1, 4), (16, 2, 4), (3, 3, 8), (12, 3, 4), (5, 5, 4)]
KERNELS = [(1, 1), (2, 2), (1, 3), (3, 2), (2, 4), (5, 1), (4, 5)]
EXACT = 1e-12
"""Their norm divides by max(|q|, eps of the dtype), ours by sqrt(|q|^2 + 1e-12): the two differ by 5e-13 / |q|^2, which
is inside of this at ordinary lengths, and not at the length of 0.01 that one test shows."""


def model_config(heads, kernels=(2, 2), temperature="raw", **changes):
    settings = {"num_query_heads": heads[0], "num_key_heads": heads[1], "head_dim": heads[2]}
    settings |= {"hidden_size": HIDDEN, "num_layers": 1, "vocab_size": 37, "conv_kernel_sizes": kernels}
    return ModelConfig.model_validate({**settings, "temperature": temperature, **changes})


def zaya_config(config, **changes):
    settings = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_query_heads,
        "num_key_value_heads": config.num_key_heads,
        "head_dim": config.head_dim,
        "cca_time0": config.conv_kernel_sizes[0],
        "cca_time1": config.conv_kernel_sizes[1],
        "num_experts": 2,
        "moe_intermediate_size": 8,
        "router_hidden_size": 8,
        "eos_token_id": None,
        "attn_implementation": "eager",
        "experts_implementation": "eager",  # the default has no fp64
    }
    return ZayaConfig(**{**settings, **changes})


def their_layer(config, **changes):
    """ZayaAttention in fp64 with random weights, biases and temperatures."""
    layer = ZayaAttention(zaya_config(config, **changes), layer_idx=0).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return layer


def our_layer(config, **changes):
    return CCGQA(
        config.hidden_size,
        config.num_query_heads,
        config.num_key_heads,
        config.head_dim,
        config.conv_kernel_sizes,
        temperature=config.temperature,
        **changes,
    ).double()


def pair(config, rope_dim=0, **changes):
    """Their layer with random weights, and ours with the same."""
    theirs, ours = their_layer(config), our_layer(config, rope_dim=rope_dim, **changes)
    ours.load_state_dict(to_ours(attention_rules(config, "", ""), theirs.state_dict()))
    return theirs, ours


def their_queries_keys_values(layer, x):
    q, k, v = layer.qkv_proj(x, None)
    return *layer.qk_norm(q, k), v


def rows(seed=0, length=ROWS):
    return torch.randn(2, length, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def causal_mask(length=ROWS):
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    return torch.zeros(1, 1, length, length, dtype=torch.float64).masked_fill(~allowed, -torch.inf)


def their_output(layer, x, rope, implementation):
    layer.config._attn_implementation = implementation
    return layer(x, attention_mask={"causal": causal_mask(x.shape[1])}, position_embeddings=rope)[0]


def errors(theirs, ours, x, relative_error):
    return [
        relative_error(mine, other)
        for mine, other in zip(ours.queries_keys_values(x), their_queries_keys_values(theirs, x), strict=True)
    ]


@pytest.mark.parametrize("kernels", KERNELS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_queries_keys_and_values_before_rotation(heads, kernels, relative_error):
    theirs, ours = pair(model_config(heads, kernels))
    assert max(errors(theirs, ours, rows(), relative_error)) <= EXACT


def test_at_the_released_size(relative_error):
    """ZAYA1-8B's layer: 8 query and 2 key heads of 128 in a width of 2,048."""
    config = model_config((8, 2, 128), hidden_size=2048)
    theirs, ours = pair(config)
    x = torch.randn(1, 5, 2048, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert max(errors(theirs, ours, x, relative_error)) <= EXACT


def test_the_norms_differ_for_short_vectors_only(relative_error):
    config = model_config((4, 2, 8))
    theirs, ours = pair(config)
    for layer in (theirs.qkv_proj.conv_qk_depthwise, theirs.qkv_proj.conv_qk_grouped):
        layer.bias.data.zero_()
    ours.load_state_dict(to_ours(attention_rules(config, "", ""), theirs.state_dict()))
    lengths = theirs.qkv_proj(rows(), None)[0].norm(dim=-1)
    assert lengths.min() > 1
    assert max(errors(theirs, ours, rows(), relative_error)) <= EXACT
    shorter = 0.01 / lengths.mean()  # without biases everything before the norm scales with the input
    assert EXACT < max(errors(theirs, ours, rows() * shorter, relative_error)) < 1e-6


@pytest.mark.parametrize("kernels", KERNELS, ids=str)
def test_the_first_rows_see_the_bias_and_not_zero(kernels, relative_error):
    """Before the first row z is zero, so the first convolution gives its bias there."""
    theirs, ours = pair(model_config((4, 2, 8), kernels))
    x = rows()
    first = sum(kernels) - 1
    mine, other = ours.queries_keys_values(x), their_queries_keys_values(theirs, x)
    for a, b in zip(mine, other, strict=True):
        for row in range(first):
            assert relative_error(a[:, row], b[:, row]) <= EXACT

    padded_apart = ZeroBefore(theirs.qkv_proj.conv_qk_grouped, kernels[1] - 1)
    theirs.qkv_proj.conv_qk_grouped = padded_apart
    wrong = their_queries_keys_values(theirs, x)
    for a, b in zip(mine[:2], wrong[:2], strict=True):
        assert relative_error(a[:, kernels[1] - 1 :], b[:, kernels[1] - 1 :]) <= EXACT
        for row in range(kernels[1] - 1):
            assert relative_error(a[:, row], b[:, row]) > 1e-3


class ZeroBefore(nn.Module):
    """The second convolution with zeros, instead of the first one's output, before the first row."""

    def __init__(self, convolution, num_rows):
        super().__init__()
        self.convolution, self.num_rows = convolution, num_rows

    def forward(self, u):
        u = u.clone()
        u[..., : self.num_rows] = 0.0
        return self.convolution(u)


@pytest.mark.parametrize("temperature", ["exp", "exp_clamp"])
@pytest.mark.parametrize("heads", [(4, 2, 8), (6, 3, 4)], ids=str)
def test_other_temperatures_as_the_factor_they_come_to(heads, temperature, randomize, relative_error):
    config = model_config(heads, temperature=temperature)
    theirs, ours = their_layer(config), randomize(our_layer(config, rope_dim=0), 1.0)
    with torch.no_grad():
        ours.prologue.tau.copy_(torch.linspace(-1.0, 2.5, config.num_key_heads))  # past both edges of the clamp
    rules = attention_rules(config, "", "")
    theirs.load_state_dict(to_theirs(rules, ours.state_dict()))
    torch.testing.assert_close(theirs.qk_norm.temp.data, ours.prologue.beta().detach(), rtol=0, atol=0)
    assert max(errors(theirs, ours, rows(), relative_error)) <= EXACT

    theirs.qk_norm.temp.data = ours.prologue.tau.data.clone()  # tau taken for the factor
    assert max(errors(theirs, ours, rows(), relative_error)) > 1e-2


def flipped_taps(name):
    def change(weights):
        weights[name] = weights[name].flip(-1)

    return change


def transposed_heads(weights):
    name = "qkv_proj.conv_qk_grouped.weight"
    weights[name] = weights[name].unflatten(0, (-1, 8)).transpose(1, 2).flatten(0, 1)


def swapped_values(weights):
    current, delayed = "qkv_proj.v_proj_current.weight", "qkv_proj.v_proj_delayed.weight"
    weights[current], weights[delayed] = weights[delayed], weights[current]


def reordered_queries(weights):
    """Query head h reads key head h mod Hk, instead of h // (Hq / Hk)."""
    name = "qkv_proj.q_proj.weight"
    weights[name] = weights[name].unflatten(0, (2, 2, 8)).transpose(0, 1).flatten(0, 2)


@pytest.mark.parametrize(
    "change",
    [
        flipped_taps("qkv_proj.conv_qk_depthwise.weight"),
        flipped_taps("qkv_proj.conv_qk_grouped.weight"),
        transposed_heads,
        swapped_values,
        reordered_queries,
    ],
)
def test_the_comparison_rejects_other_layouts(change, relative_error):
    config = model_config((4, 2, 8))
    theirs, ours = pair(config)
    weights = dict(theirs.state_dict())
    change(weights)
    ours.load_state_dict(to_ours(attention_rules(config, "", ""), weights))
    assert max(errors(theirs, ours, rows(), relative_error)) > 1e-2


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("theta", [10_000.0, 5_000_000.0])
def test_output_of_the_layer(heads, theta, relative_error):
    """Their softmax and rotation tables are fp32 whatever the model is, hence 1e-6."""
    config = model_config(heads, rope_theta=theta)
    theirs, ours = pair(config, config.rope_dim, rope_theta=theta)
    parameters = {"hybrid": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5}}
    tables = ZayaRotaryEmbedding(zaya_config(config, rope_parameters=parameters))
    x = rows()
    rope = tables(x, torch.arange(ROWS).unsqueeze(0), "hybrid")
    out = their_output(theirs, x, rope, "eager")
    assert relative_error(ours(x), out) <= 1e-6

    other_theta = 10_000.0 if theta > 10_000.0 else 5_000_000.0
    ours.rope_theta = other_theta
    if config.rope_dim > 2:  # with one pair the angle is the position itself
        assert relative_error(ours(x), out) > 1e-6


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_rotated_share_of_a_head(fraction, relative_error):
    config = model_config((4, 2, 8), rope_fraction=fraction)
    theirs, ours = pair(config, config.rope_dim)
    parameters = {"hybrid": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": fraction}}
    tables = ZayaRotaryEmbedding(zaya_config(config, rope_parameters=parameters))
    x = rows()
    rope = tables(x, torch.arange(ROWS).unsqueeze(0), "hybrid")
    assert relative_error(ours(x), their_output(theirs, x, rope, "eager")) <= 1e-6


def test_the_tables_that_the_exact_comparisons_use_are_theirs_up_to_fp32():
    config = model_config((4, 2, 8))
    x = rows()
    parameters = {"hybrid": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}}
    theirs = ZayaRotaryEmbedding(zaya_config(config, rope_parameters=parameters))(x, torch.arange(ROWS)[None], "hybrid")
    for mine, other in zip(exact_tables(config), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def exact_tables(config):
    """Their form of our tables in fp64: [1, S, rotated dimensions], each angle twice."""
    cosines, sines = rope_tables(torch.arange(ROWS), config.rope_dim, config.rope_theta, torch.float64)
    return tuple(torch.cat([table, table], dim=-1).transpose(0, 1) for table in (cosines, sines))


@pytest.mark.parametrize("kernels", [(2, 2), (3, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_output_and_every_gradient_in_fp64(heads, kernels, relative_error):
    """With their SDPA attention and our tables nothing is fp32 on either side."""
    config = model_config(heads, kernels)
    theirs, ours = pair(config, config.rope_dim)
    x, weight = rows(), rows(seed=1)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    out, expected = ours(inputs[0]), their_output(theirs, inputs[1], exact_tables(config), "sdpa")
    assert relative_error(out, expected) <= 10 * EXACT
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert relative_error(inputs[0].grad, inputs[1].grad) <= 1e-9
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = to_ours(attention_rules(config, "", ""), wanted)
    assert set(found) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert relative_error(parameter.grad, found[name]) <= 1e-9, name


def test_the_gradient_of_tau_is_that_of_the_factor_times_it(randomize, relative_error):
    config = model_config((6, 3, 4), temperature="exp")
    theirs, ours = their_layer(config), randomize(our_layer(config, rope_dim=config.rope_dim), 1.0)
    theirs.load_state_dict(to_theirs(attention_rules(config, "", ""), ours.state_dict()))
    x, weight = rows(), rows(seed=1)
    (ours(x) * weight).sum().backward()
    (their_output(theirs, x, exact_tables(config), "sdpa") * weight).sum().backward()
    factor = theirs.qk_norm.temp
    assert relative_error(ours.prologue.tau.grad, factor.grad * factor.data) <= 1e-9
    assert relative_error(ours.prologue.tau.grad, factor.grad) > 1e-2


@pytest.mark.parametrize(("heads", "window"), list(itertools.product([(4, 2, 8), (3, 3, 8)], [1, 4])), ids=str)
def test_full_and_sliding_layers_inside_their_model(heads, window, relative_error):
    """What their model hands its layers (masks of ``hybrid_sliding``, a theta a type) is what ours makes by itself."""
    config = model_config(heads, num_layers=3)
    kinds = ["hybrid", "hybrid_sliding", "hybrid_sliding"]
    settings = {"num_hidden_layers": 3, "layer_types": kinds, "sliding_window": window}
    model = ZayaForCausalLM(zaya_config(config, **settings)).double().eval()
    seen = []
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.load_state_dict(their_layer(config).state_dict())
        attention.register_forward_hook(
            lambda module, args, kwargs, output: seen.append((kwargs["hidden_states"], output[0])), with_kwargs=True
        )
    with torch.no_grad():
        model(torch.randint(0, 37, (2, ROWS), generator=torch.Generator().manual_seed(0)), use_cache=False)
    assert len(seen) == 3
    for kind, (x, out) in zip(kinds, seen, strict=True):
        theta = model.config.rope_parameters[kind]["rope_theta"]
        _, ours = pair(config, config.rope_dim, rope_theta=theta, window=window if kind == "hybrid_sliding" else None)
        assert relative_error(ours(x), out) <= 1e-6
        ours.window = window + 1 if kind == "hybrid_sliding" else window
        assert relative_error(ours(x), out) > 1e-3
