"""The whole model: forms of its forward, dtypes, checkpointing, and parameters that are read where ZeRO-3 has them."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import set_checkpoint_early_stop

from hydra_dist.context import ContextParallel, run_ranks
from hydra_dist.errors import ConfigError
from hydra_dist.model import GQA, Transformer, initialize, tiled_mlp


def build(config, seed=0, **options):
    model = Transformer(config, **options)
    initialize(model, seed)
    return model


def batch(length=19, rows=2):
    tokens = torch.randint(0, 37, (rows, length + 1))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("changes", [{}, {"attention": "gqa"}, {"tie_embeddings": False}, {"window": 4}])
def test_loss_is_that_of_the_logits(changes, model_config, relative_error):
    model = build(model_config(**changes), loss_chunk_size=7).double()
    tokens, targets = batch()
    targets = targets.clone()
    targets[0, :5] = -100
    logits = model(tokens)
    assert logits.shape == (2, 19, 37)
    rows = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 19)
    assert relative_error(model(tokens, targets=targets), rows.sum()) < 1e-13
    none = model(tokens, targets=targets, reduction="none")
    assert relative_error(none, rows) < 1e-13
    assert not none.requires_grad


def test_no_row_sees_a_later_one(model_config):
    model = build(model_config(conv_kernel_sizes=(3, 3))).double()
    tokens, _ = batch()
    changed = tokens.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % 37
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :11], after[:, :11], rtol=0, atol=1e-14)
    assert (before[:, 11] - after[:, 11]).abs().max() > 1e-3


def test_packed_documents_equal_documents_alone(model_config, relative_error):
    model = build(model_config(conv_kernel_sizes=(2, 3))).double()
    tokens, _ = batch(rows=1)
    cuts = [0, 1, 8, 9, 19]
    starts = torch.zeros(1, 19, dtype=torch.long)
    for start, stop in pairwise(cuts):
        starts[:, start:stop] = start
    packed = model(tokens, ContextParallel(None).plan(19, starts))
    alone = torch.cat([model(tokens[:, a:b]) for a, b in pairwise(cuts)], dim=1)
    assert relative_error(packed, alone) < 1e-12
    assert relative_error(model(tokens), alone) > 1e-3


def gradients(model, tokens, targets, seq=None):
    model.zero_grad()
    loss = model(tokens, seq, targets=targets)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("attention", ["ccgqa", "gqa"])
def test_checkpointing_changes_no_number(attention, model_config):
    config = model_config(attention=attention)
    tokens, targets = batch()
    plain = gradients(build(config), tokens, targets)
    kept = gradients(build(config, activation_checkpointing="layer"), tokens, targets)
    assert plain[0] == kept[0]
    for name, grad in plain[1].items():
        assert torch.equal(grad, kept[1][name]), name


def test_checkpointing_does_not_run_attention_again(model_config, monkeypatch):
    """Over two ranks, the ring's bytes are those of a step without checkpointing."""
    config = model_config()
    tokens, targets = batch(32, rows=1)

    def step(mesh, checkpointing):
        seq = ContextParallel(mesh).plan(32)
        model = build(config, activation_checkpointing=checkpointing)
        model(seq.shard(tokens, 1), seq, targets=seq.shard(targets, 1)).backward()
        return seq.stats()

    plain, kept = (run_ranks(2, lambda mesh, c=c: step(mesh, c), timeout=60) for c in ("none", "layer"))
    for a, b in zip(plain, kept, strict=True):
        assert ring_traffic(a) == ring_traffic(b)
        assert ring_traffic(a)


def test_the_check_above_sees_a_second_ring(model_config, monkeypatch):
    monkeypatch.setattr("hydra_dist.model.transformer.SAVED_BY_CHECKPOINT", [])
    with pytest.raises(AssertionError):
        test_checkpointing_does_not_run_attention_again(model_config, monkeypatch)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_an_mlp_in_tiles_changes_no_number(checkpointing, compiled, model_config, relative_error):
    config, (tokens, targets) = model_config(), batch()
    loss, expected = gradients(build(config).double(), tokens, targets)
    tiled = build(config, mlp_tile_size=7, activation_checkpointing=checkpointing).double()
    if compiled:
        torch.compiler.reset()
        tiled.compile_layers(backend="aot_eager")
    tiled_loss, found = gradients(tiled, tokens, targets)
    assert relative_error(tiled_loss, loss) < 1e-12
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert relative_error(found[name], grad) < 1e-12, name


def tiles_computed(model, monkeypatch):
    """How often a tile's gate and up are computed in a step."""
    count = 0
    compute = tiled_mlp.gated

    def counted(gate_up):
        nonlocal count
        count += 1
        return compute(gate_up)

    with monkeypatch.context() as patch:
        patch.setattr(tiled_mlp, "gated", counted)
        gradients(model, *batch())
    return count


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_every_tile_is_computed_once_forward_and_once_backward(checkpointing, compiled, model_config, monkeypatch):
    model = build(model_config(num_layers=3), activation_checkpointing=checkpointing, mlp_tile_size=10)
    if compiled:
        torch.compiler.reset()
        model.compile_layers(backend="aot_eager")
    assert tiles_computed(model, monkeypatch) == 2 * 3 * 4, "38 rows are 4 tiles"


def test_the_check_above_sees_tiles_that_are_computed_for_nobody(model_config, monkeypatch):
    model = build(model_config(num_layers=3), activation_checkpointing="layer", mlp_tile_size=10)
    with set_checkpoint_early_stop(False):
        assert tiles_computed(model, monkeypatch) == 3 * 3 * 4


def ring_traffic(stats):
    """All that was sent but the halo, a few rows a layer, which is asked for again when a layer is computed again."""
    return {
        (direction, kind): counts
        for direction, numbers in stats.items()
        for kind, counts in numbers["kinds"].items()
        if kind != "halo"
    }


def test_under_autocast_the_residual_stream_stays_fp32(model_config):
    model = build(model_config())
    seen = {}

    def look(name, module):
        module.register_forward_hook(lambda module, args, out: seen.update({name: (args[0].dtype, out.dtype)}))

    for name, module in model.named_modules():
        if name.startswith("layers.") and "norm" not in name and not name.endswith("prologue"):
            look(name, module)
    tokens, targets = batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, targets=targets)
    assert loss.dtype == torch.float32
    for layer in ("layers.0", "layers.1"):
        assert seen[layer] == (torch.float32, torch.float32)
        for linear in ("attention.down", "attention.output", "mlp.gate_up", "mlp.down"):
            assert seen[f"{layer}.{linear}"] == (torch.bfloat16, torch.bfloat16)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("mode", ["autocast", "bf16"])
def test_low_precision_loss_is_near_fp64(mode, model_config):
    model = build(model_config())
    tokens, targets = batch()
    exact = model.double()(tokens, targets=targets).item()
    model.float()
    if mode == "bf16":
        model.bfloat16()
        ours = model(tokens, targets=targets)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            ours = model(tokens, targets=targets)
    assert ours.dtype == torch.float32
    assert abs(ours.item() - exact) < 5e-3 * exact


class Partitioned:
    """What ZeRO-3 does: a parameter has its shape only while the module that owns it runs forward or backward."""

    def __init__(self, model):
        self.whole = {id(p): p.data for p in model.parameters()}
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            module.register_forward_pre_hook(lambda module, args, own=own: self.gather(own))
            module.register_forward_hook(lambda module, args, out, own=own: self.release(own))
            self.release(own)

    def gather(self, parameters):
        for parameter in parameters:
            parameter.data = self.whole[id(parameter)]

    def release(self, parameters):
        for parameter in parameters:
            parameter.data = parameter.data.new_empty(0)


@pytest.mark.parametrize("tile_size", [None, 7])
@pytest.mark.parametrize("changes", [{}, {"attention": "gqa"}, {"tie_embeddings": False}])
def test_parameters_are_read_only_while_their_module_runs(changes, tile_size, model_config):
    config = model_config(**changes)
    tokens, targets = batch()
    expected = build(config, mlp_tile_size=tile_size)(tokens, targets=targets)
    model = build(config, mlp_tile_size=tile_size)
    Partitioned(model)
    assert {p.numel() for p in model.parameters()} == {0}
    with torch.no_grad():
        assert torch.equal(model(tokens, targets=targets), expected.detach())


def test_the_check_above_rejects_a_weight_read_from_outside(model_config):
    model = build(model_config())
    Partitioned(model)
    model.head.forward = lambda x, targets=None, reduction="sum": nn.functional.linear(x, model.norm.weight)
    with torch.no_grad(), pytest.raises(RuntimeError):
        model(batch()[0])
    tiled = build(model_config(), mlp_tile_size=7)
    Partitioned(tiled)
    mlp = tiled.layers[0].mlp
    mlp.forward = lambda x: tiled_mlp.tiled_mlp(x, mlp.gate_up.weight, mlp.down.weight, 7)
    with torch.no_grad(), pytest.raises(ValueError, match="expected"):
        tiled(batch()[0])


def test_tied_and_untied_heads(model_config):
    tied, untied = Transformer(model_config()), Transformer(model_config(tie_embeddings=False))
    assert tied.head.weight is tied.embedding.weight
    assert "head.weight" not in dict(tied.named_parameters())
    assert "head.weight" in dict(untied.named_parameters())


def test_what_cannot_work_is_refused(model_config):
    with pytest.raises(ConfigError, match="vocab_size is not set"):
        Transformer(model_config(vocab_size=None))
    with pytest.raises(ConfigError, match=r'layers: none or layer works \(did you mean "layer"\?\)'):
        Transformer(model_config(), activation_checkpointing="layers")


def test_every_layer_is_built_from_what_it_comes_to(model_config):
    own = {
        "compression_factor": 1,
        "conv_kernel_sizes": (3, 1),
        "use_qk_mean": False,
        "use_qk_norm": False,
        "use_value_shift": False,
        "use_output_norm": True,
        "window": 4,
    }
    entries = ({"layers": [0], **own}, {"layers": [1], "attention": "gqa"}, {"layers": [3], "temperature": "exp_clamp"})
    plain, other, changed = (
        Transformer(model_config(num_layers=4, layer_settings=layers)).layers for layers in ((), entries[1:], entries)
    )
    first = changed[0].attention
    assert (first.num_query_heads, first.num_key_heads, first.head_dim, first.window) == (3, 3, 8, 4)
    assert first.prologue.depthwise_weight.shape == (48, 3)
    assert first.prologue.grouped_weight.shape == (6, 8, 8)
    assert (first.prologue.tau, first.prologue.switches.use_qk_mean, first.use_value_shift) == (None, False, False)
    assert first.output_norm.weight.shape == (24,)
    assert isinstance(changed[1].attention, GQA)
    assert [layer.attention.prologue.temperature for layer in changed[2:]] == ["exp", "exp_clamp"]
    shapes = [
        [{n: p.shape for n, p in layer.named_parameters()} for layer in layers] for layers in (plain, other, changed)
    ]
    assert shapes[0][2] == shapes[0][0] == shapes[2][2], "layers that nothing is said of are those of the model"
    assert shapes[1][0] == shapes[0][0] != shapes[2][0]


def test_an_output_norm_has_the_epsilon_of_the_model(model_config):
    model = Transformer(model_config(use_output_norm=True, norm_eps=0.5))
    assert {layer.attention.output_norm.eps for layer in model.layers} == {0.5}


def test_every_layer_has_a_window_of_its_own(model_config):
    model = Transformer(model_config(num_layers=3, layer_windows=(4, None)))
    assert [layer.attention.window for layer in model.layers] == [4, None, 4]
    initialize(model, 0)
    tokens = torch.randint(model.config.vocab_size, (1, 40))
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % model.config.vocab_size
    reach = (model(tokens) != model(changed)).any(-1)[0]
    assert reach.all(), "the full layer passes on the first row to all others"
    narrow = Transformer(model_config(num_layers=3, window=4))
    initialize(narrow, 0)
    assert not (narrow(tokens) != narrow(changed)).any(-1)[0, 30:].any()
