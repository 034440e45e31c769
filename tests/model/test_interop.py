"""Models to and from transformers' names: the same bits, the same function, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, ZayaConfig, ZayaForCausalLM

from hydra_dist.errors import ConfigError, RunError
from hydra_dist.model import Transformer, initialize
from hydra_dist.model.interop import from_hugging_face, load_weights, read_hugging_face, to_hugging_face
from hydra_dist.model.interop.convert import patterns
from hydra_dist.model.interop.files import new_folder, parse_size, write_json, write_weights

ZAYA = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "cca_time0": 3,
    "num_experts": 2,
    "moe_intermediate_size": 16,
    "router_hidden_size": 8,
    "eos_token_id": None,
}
LLAMA = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}
GQA = {"attention": "gqa", "hidden_size": 32, "rope_fraction": 1.0}
EXPERTS = ("mlp", "residual_scale", "model.input_hidden_states")


def random_model(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


def their_zaya(**changes):
    config = ZayaConfig(**{**ZAYA, **changes})
    if "rope_parameters" not in changes:
        for kind in config.rope_parameters.values():
            kind["rope_theta"] = 5_000_000.0
    return random_model(ZayaForCausalLM(config))


def their_llama(**changes):
    return random_model(LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes})))


def written(model, folder, **settings):
    model.save_pretrained(folder, **settings)
    return folder


def our_model(config, seed=0):
    model = Transformer(config)
    initialize(model, seed)
    return random_model(model, seed)


def our_weights(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def tokens(length=13):
    return torch.randint(0, 37, (2, length), generator=torch.Generator().manual_seed(5))


def write(exported, folder, max_shard_size=10**9):
    with new_folder(folder) as aside:
        write_weights(aside, exported.tensors, max_shard_size)
        write_json(aside / "config.json", exported.config)
    return folder


# Function


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False},
        {"num_key_heads": 4, "norm_eps": 1e-3, "rope_theta": 123.0},
        {"num_key_heads": 1, "head_dim": 10, "mlp_expansion": 1.0},
    ],
    ids=str,
)
def test_a_gqa_model_is_a_llama(changes, model_config, tmp_path, relative_error):
    config = model_config(**{**GQA, **changes})
    model = our_model(config)
    folder = write(to_hugging_face(config, our_weights(model)), tmp_path / "llama")
    theirs, loading = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    with torch.no_grad():
        logits = model(tokens())
        assert relative_error(logits, theirs(tokens()).logits) <= 1e-5
        other = our_model(model_config(**{**GQA, **changes, "rope_theta": 5_000.0}))
        assert relative_error(other(tokens()), logits) > 1e-4


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}], ids=str)
def test_a_llama_is_a_gqa_model(changes, tmp_path, relative_error):
    theirs = their_llama(**changes)
    imported = read_hugging_face(written(theirs, tmp_path / "llama"))
    assert imported.left_out == []
    model = Transformer(imported.config)
    assert load_weights(model, imported.weights) == []
    with torch.no_grad():
        assert relative_error(model(tokens()), theirs(tokens()).logits) <= 1e-5


def test_the_attention_of_a_zaya_computes_the_same(tmp_path, relative_error):
    """In fp32, through files, for full and sliding layers; test_zaya_parity.py has the fp64 comparison."""
    kinds = ["hybrid_sliding", "hybrid"]
    theirs = their_zaya(layer_types=kinds, sliding_window=4)
    seen = []
    for layer in theirs.model.layers:
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, output: seen.append((kwargs["hidden_states"], output[0])), with_kwargs=True
        )
    imported = read_hugging_face(written(theirs, tmp_path / "zaya"), skip_unmatched=True)
    assert imported.config.windows == (4, None)
    model = Transformer(imported.config)
    left = load_weights(model, imported.weights)
    assert left == [f"layers.{layer}.mlp.{part}.weight" for layer in range(2) for part in ("gate_up", "down")]
    with torch.no_grad():
        theirs(tokens(), use_cache=False)
        for ours, (x, out) in zip(model.layers, seen, strict=True):
            assert relative_error(ours.attention(x), out) <= 1e-5


def test_transformers_reads_what_a_ccgqa_model_has_of_a_zaya(model_config, tmp_path, relative_error):
    config = model_config(temperature="exp", layer_windows=[3, None], rope_theta=500.0, tie_embeddings=False)
    model = our_model(config)
    exported = to_hugging_face(config, our_weights(model), skip_unmatched=True)
    assert exported.left_out == ["layers.*.mlp.down.weight (2)", "layers.*.mlp.gate_up.weight (2)"]
    small = {key: ZAYA[key] for key in ("num_experts", "moe_intermediate_size", "router_hidden_size")}
    folder = write(exported, tmp_path / "zaya")
    theirs, loading = ZayaForCausalLM.from_pretrained(folder, output_loading_info=True, **small)
    assert not loading["unexpected_keys"]
    assert all(any(part in name for part in EXPERTS) for name in loading["missing_keys"])
    outputs = []
    for layer in theirs.model.layers:
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, output: outputs.append((kwargs["hidden_states"], output[0])), with_kwargs=True
        )
    with torch.no_grad():
        theirs(tokens(), use_cache=False)
        for ours, (x, out) in zip(model.layers, outputs, strict=True):
            assert relative_error(ours.attention(x), out) <= 1e-5
            ours.attention.rope_theta *= 2
            assert relative_error(ours.attention(x), out) > 1e-4


# Bits


@pytest.mark.parametrize(
    "changes",
    [
        {**GQA},
        {**GQA, "tie_embeddings": False},
        {"temperature": "raw"},
        {"temperature": "raw", "tie_embeddings": False, "layer_windows": [5, None]},
        {"temperature": "raw", "conv_kernel_sizes": [4, 3], "num_key_heads": 1, "rope_fraction": 0.3},
        {"temperature": "raw", "hidden_size": 20, "num_query_heads": 6, "num_key_heads": 3, "head_dim": 6},
    ],
    ids=str,
)
def test_ours_there_and_back(changes, model_config, tmp_path):
    config = model_config(**changes)
    weights = our_weights(our_model(config))
    mlps = {name for name in weights if ".mlp." in name and config.attention == "ccgqa"}
    exported = to_hugging_face(config, weights, skip_unmatched=True)
    back = read_hugging_face(write(exported, tmp_path / "hf", max_shard_size=4_000), skip_unmatched=True)
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 3
    assert same(back.weights, {name: weight for name, weight in weights.items() if name not in mlps})
    for key in ("attention", "num_query_heads", "num_key_heads", "head_dim", "conv_kernel_sizes", "temperature"):
        assert getattr(back.config, key) == getattr(config, key), key
    for key in ("windows", "rope_dim", "rope_theta", "norm_eps", "tie_embeddings", "vocab_size", "num_layers"):
        assert getattr(back.config, key) == getattr(config, key), key
    assert config.attention == "ccgqa" or back.config.mlp_size == config.mlp_size


@pytest.mark.parametrize("shard", ["5GB", "3KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "build", [their_zaya, their_llama, lambda: their_llama(tie_word_embeddings=True)], ids=["zaya", "llama", "tied"]
)
def test_theirs_there_and_back(build, dtype, shard, tmp_path):
    theirs = build().to(dtype)
    imported = read_hugging_face(written(theirs, tmp_path / "hf", max_shard_size=shard), skip_unmatched=True)
    exported = to_hugging_face(imported.config, imported.weights, skip_unmatched=True)
    wanted = {name: weight for name, weight in theirs.state_dict().items() if not any(x in name for x in EXPERTS)}
    if build is not their_zaya:
        wanted = dict(theirs.state_dict())
    if theirs.config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    assert same(exported.tensors, wanted)
    for key in exported.config:
        if key not in ("rope_theta", "architectures", "initializer_range", "pad_token_id", "sliding_window"):
            assert exported.config[key] == getattr(theirs.config, key), key


def test_a_tensor_in_another_layout_is_not_the_same_bits(model_config):
    config = model_config(temperature="raw")
    weights = our_weights(our_model(config))
    exported = to_hugging_face(config, weights, skip_unmatched=True)
    name = "model.layers.0.self_attn.qkv_proj.conv_qk_grouped.weight"
    exported.tensors[name] = exported.tensors[name].flip(-1)
    back = from_hugging_face(exported.config, exported.tensors, skip_unmatched=True).weights
    changed = [name for name in back if not torch.equal(back[name], weights[name])]
    assert changed == ["layers.0.attention.prologue.grouped_weight"]


@pytest.mark.parametrize("temperature", ["exp", "exp_clamp"])
def test_other_temperatures_become_the_factor(temperature, model_config, relative_error):
    """exp -> there -> raw: the factor is rounded once, everything else is the same bits."""
    config = model_config(temperature=temperature)
    model = our_model(config)
    model.layers[0].attention.prologue.tau.data = torch.tensor([-1.0, 2.5])
    exported = to_hugging_face(config, our_weights(model), skip_unmatched=True)
    back = from_hugging_face(exported.config, exported.tensors, skip_unmatched=True)
    assert back.config.temperature == "raw"
    taus = {f"layers.{index}.attention.prologue.tau": layer.attention for index, layer in enumerate(model.layers)}
    weights = our_weights(model)
    for name, weight in back.weights.items():
        assert torch.equal(weight, taus[name].prologue.beta() if name in taus else weights[name]), name

    copy = Transformer(back.config)
    load_weights(copy, {**weights, **back.weights})
    with torch.no_grad():
        logits = model(tokens())
        assert relative_error(copy(tokens()), logits) <= 1e-6
        load_weights(copy, {name: weights[name] for name in taus})
        assert relative_error(copy(tokens()), logits) > 1e-3


# The first release


def first_release(tensors, config):
    """A zaya state dict and config.json as the first release had them."""
    renames = {
        "self_attn.qkv_proj.q_proj": "self_attn.qkv.linear_q",
        "self_attn.qkv_proj.k_proj": "self_attn.qkv.linear_k",
        "self_attn.qkv_proj.v_proj_current": "self_attn.qkv.val_proj1",
        "self_attn.qkv_proj.v_proj_delayed": "self_attn.qkv.val_proj2",
        "self_attn.qkv_proj.conv_qk_depthwise": "self_attn.qkv.conv_qk.0",
        "self_attn.qkv_proj.conv_qk_grouped": "self_attn.qkv.conv_qk.1",
        "self_attn.qk_norm.temp": "self_attn.qkv.temp",
        "input_layernorm": "input_norm",
        "model.norm": "model.final_norm",
    }
    found = {"model.layers.0.res_scale.hidden_states_scale": torch.ones(24)}
    for layer in range(2):
        found[f"model.layers.{2 * layer + 1}.zaya_block.router.down_proj.weight"] = torch.ones(8, 24)
        found[f"model.layers.{2 * layer + 1}.res_scale.hidden_states_scale"] = torch.ones(24)
    for name, tensor in tensors.items():
        for layer in (1, 0):
            name = name.replace(
                f"model.layers.{layer}.post_attention_layernorm", f"model.layers.{2 * layer + 1}.input_norm"
            )
            if "self_attn" in name or "input_layernorm" in name:
                name = name.replace(f"model.layers.{layer}.", f"model.layers.{2 * layer}.")
        for today, then in renames.items():
            name = name.replace(today, then)
        found[name] = tensor
    settings = {
        "model_type": "zaya",
        "vocab_size": 37,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "cca_num_q_heads": 4,
        "num_key_value_heads": 2,
        "num_query_groups": 2,
        "cca_time0": config["cca_time0"],
        "norm_epsilon": 1e-5,
        "rope_theta": 1_000_000,
        "partial_rotary_factor": 0.5,
        "rope_scaling": False,
        "sliding_window": None,
        "tie_word_embeddings": True,
    }
    return settings, found


def test_names_and_settings_of_the_first_release():
    changes = {"hidden_size": 32, "rope_parameters": {"hybrid": {"rope_type": "default", "rope_theta": 1_000_000.0}}}
    theirs = their_zaya(**changes)
    kept = {name: weight for name, weight in theirs.state_dict().items() if not any(x in name for x in EXPERTS)}
    del kept["lm_head.weight"]
    today = from_hugging_face(theirs.config.to_dict(), kept, skip_unmatched=True)
    settings, tensors = first_release(kept, theirs.config.to_dict())
    assert "model.layers.2.self_attn.qkv.conv_qk.0.bias" in tensors
    then = from_hugging_face(settings, tensors, skip_unmatched=True)
    assert same(then.weights, today.weights)
    assert then.config == today.config
    assert then.left_out == [
        "model.layers.*.res_scale.hidden_states_scale (3)",
        "model.layers.*.zaya_block.router.down_proj.weight (2)",
    ]
    with pytest.raises(ConfigError, match="swa_layers"):
        from_hugging_face({**settings, "swa_layers": [0, 0, 4096, 0]}, tensors, skip_unmatched=True)
    clamped = from_hugging_face({**settings, "clamp_temp": True}, tensors, skip_unmatched=True)
    assert clamped.config.temperature == "exp_clamp"


# What is refused


def test_experts_are_named_and_refused(tmp_path):
    theirs = their_zaya()
    folder = written(theirs, tmp_path / "zaya")
    with pytest.raises(ConfigError) as error:
        read_hugging_face(folder)
    message = str(error.value)
    assert "model.layers.*.mlp.experts.gate_up_proj (2)" in message
    assert "model.layers.*.mlp.gate.router_states_scale (1)" in message
    assert "model.layers.*.post_mlp_residual_scale.residual_bias (2)" in message
    assert "--skip-unmatched" in message
    left_out = read_hugging_face(folder, skip_unmatched=True).left_out
    assert all(pattern in message for pattern in left_out)
    count = sum(any(part in name for part in EXPERTS) for name in theirs.state_dict())
    assert sum(int(pattern.rpartition("(")[2][:-1]) for pattern in left_out) == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"layers\.\*\.mlp\.down\.weight \(2\), layers\.\*\.mlp\.gate_up\.weight \(2\); --skip-unmatched"),
        ({"use_output_norm": True}, r"layers\.\*\.attention\.output_norm\.weight \(2\)"),
        ({"use_convs": False}, "model.use_convs is false"),
        ({"use_value_shift": False}, "model.use_value_shift is false"),
        ({"use_qk_norm": False}, "model.use_qk_norm is false"),
        ({"layer_settings": [{"layers": [1], "num_key_heads": 4}]}, "num_key_heads is 2 in layer 0 and 4 in layer 1"),
        ({"layer_settings": [{"layers": [1], "attention": "gqa"}]}, "ccgqa and gqa"),
        ({"layer_windows": [3, 5]}, "windows of 3 and 5"),
        ({**GQA, "rope_fraction": 0.5}, "rope_fraction 0.5"),
        ({**GQA, "window": 4}, "window 4"),
        ({**GQA, "hidden_size": 24, "num_query_heads": 5, "num_key_heads": 5}, "no multiple of 5 query heads"),
    ],
    ids=str,
)
def test_models_without_a_counterpart_there(changes, message, model_config):
    config = model_config(**changes)
    with pytest.raises(ConfigError, match=message):
        to_hugging_face(config, our_weights(our_model(config)))


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (LLAMA, {"model_type": "lama"}, r'model_type is .lama.: llama and zaya can be read \(did you mean "llama"'),
        (LLAMA, {"model_type": None}, "llama and zaya can be read"),
        (LLAMA, {"hidden_size": "32"}, "hidden_size is '32': a positive integer is needed"),
        (LLAMA, {"num_hidden_layers": None}, "num_hidden_layers is None"),
        (LLAMA, {"attention_bias": True}, "attention_bias is True"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (LLAMA, {"intermediate_size": 50}, "intermediate_size is 50: a multiple of 16"),
        (LLAMA, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope type 'llama3'"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        (LLAMA, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (LLAMA, {"num_key_value_heads": 3}, "num_query_heads 4 is not a multiple of"),
        (ZAYA, {"layer_types": ["hybrid", "mamba"]}, "layer_types"),
        (ZAYA, {"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 4}, "full and sliding layers rotate"),
        (ZAYA, {"layer_types": ["hybrid_sliding"] * 2}, "sliding_window is missing"),
        (ZAYA, {"lm_head_bias": True}, "lm_head_bias is True"),
        (ZAYA, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.4}}, "no even number"),
    ],
    ids=str,
)
def test_settings_without_a_counterpart_here(base, changes, message):
    model_type = "llama" if base is LLAMA else "zaya"
    with pytest.raises(ConfigError, match=message):
        from_hugging_face({"model_type": model_type, **base, **changes}, {}, skip_unmatched=True)


def test_a_head_that_is_tied_and_differs_is_refused():
    theirs = their_llama()
    config = {**theirs.config.to_dict(), "tie_word_embeddings": True}
    with pytest.raises(ConfigError, match="tie_word_embeddings is true"):
        from_hugging_face(config, theirs.state_dict())
    tensors = {**theirs.state_dict(), "lm_head.weight": theirs.state_dict()["model.embed_tokens.weight"]}
    assert from_hugging_face(config, tensors).left_out == []


# Damage


def test_damaged_folders(tmp_path):
    folder = written(their_llama(), tmp_path / "llama", max_shard_size="8KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    index = folder / "model.safetensors.index.json"
    whole, listing, config = shard.read_bytes(), index.read_text(), (folder / "config.json").read_text()
    assert read_hugging_face(folder).left_out == []

    shard.write_bytes(whole[:-1])
    with pytest.raises(RunError, match=rf"{shard.name} is damaged or cut short"):
        read_hugging_face(folder)
    shard.unlink()
    with pytest.raises(RunError, match=rf"{shard.name} is missing"):
        read_hugging_face(folder)
    tensors = load_file(sorted(folder.glob("model-*.safetensors"))[0])
    save_file(tensors, shard)
    with pytest.raises(RunError, match=rf"{shard.name} lacks model\."):
        read_hugging_face(folder)
    shard.write_bytes(whole)

    index.write_text(listing.replace(shard.name, f"../{shard.name}"))
    with pytest.raises(RunError, match="no file of this folder"):
        read_hugging_face(folder)
    index.write_text(listing[:-20])
    with pytest.raises(RunError, match=r"index\.json cannot be read"):
        read_hugging_face(folder)
    index.write_text("{}")
    with pytest.raises(RunError, match="weight_map"):
        read_hugging_face(folder)
    index.write_text(listing)

    changed = json.loads(config)
    (folder / "config.json").write_text(json.dumps({**changed, "vocab_size": 38}))
    with pytest.raises(RunError, match=r"embed_tokens.weight is \[37, 32\], and the configuration asks for \[38, 32\]"):
        read_hugging_face(folder)
    (folder / "config.json").write_text(json.dumps({**changed, "num_hidden_layers": 3}))
    with pytest.raises(RunError, match=r"model\.layers\.2\.input_layernorm\.weight \[32\] is missing"):
        read_hugging_face(folder)
    (folder / "config.json").write_text(json.dumps({**changed, "num_hidden_layers": 1}))
    with pytest.raises(ConfigError, match=r"model\.layers\.\*\.self_attn\.q_proj\.weight \(1\)"):
        read_hugging_face(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        read_hugging_face(folder)
    (folder / "config.json").write_text(config)
    assert read_hugging_face(folder).left_out == []


def test_folders_of_another_kind(tmp_path):
    with pytest.raises(ConfigError, match="is no folder"):
        read_hugging_face(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        read_hugging_face(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="pickled weights are not read"):
        read_hugging_face(tmp_path)


def test_quantized_weights_are_refused():
    tensors = {name: weight.to(torch.float8_e4m3fn) for name, weight in their_llama().state_dict().items()}
    with pytest.raises(RunError, match="quantized weights are not read"):
        from_hugging_face(their_llama().config.to_dict(), tensors)


def test_weights_of_another_model_are_not_loaded(model_config):
    model = our_model(model_config())
    before = {name: weight.clone() for name, weight in our_weights(model).items()}
    with pytest.raises(RunError, match=r"norm.weigth is no parameter of this model \(did you mean"):
        load_weights(model, {"embedding.weight": torch.zeros(37, 24), "norm.weigth": torch.zeros(24)})
    with pytest.raises(RunError, match=r"norm.weight is \[23\], and this model's is \[24\]"):
        load_weights(model, {"embedding.weight": torch.zeros(37, 24), "norm.weight": torch.zeros(23)})
    assert same(our_weights(model), before)


# Files


def test_shards_are_no_larger_than_asked_for(tmp_path):
    tensors = {f"t{index}": torch.full((250,), float(index)) for index in range(7)} | {"large": torch.ones(2000)}
    files = write_weights(tmp_path, tensors, max_shard_size=3_000)
    assert len(files) == 4
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 3750, "total_size": 15_000}
    for file in files:
        held = load_file(tmp_path / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == set(held)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 3_000
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in held.items())


def test_a_new_folder_is_whole_or_not_there(tmp_path):
    def write(folder, *names):
        with new_folder(folder) as aside:
            (aside / "half").write_text("x")
            assert not folder.exists()
            for name in names:
                (aside / name).write_text("x")

    with pytest.raises(TypeError):
        write(tmp_path / "a", 0)
    with pytest.raises(RunError, match="a could not be written"):
        write(tmp_path / "a", "nowhere/file")
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "b" / "a", "whole")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["a"]
    with pytest.raises(ConfigError, match="is there already"):
        write(tmp_path / "b" / "a", "whole")
    assert (tmp_path / "b" / "a" / "whole").read_text() == "x"


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5K", 1500), ("7", 7)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "GB", "5XB", "-1GB", "five"])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="5GB or 500MB works"):
        parse_size(text)


def test_patterns_count_what_they_stand_for():
    names = ["model.layers.0.a.weight", "model.layers.11.a.weight", "model.layers.3.experts.7.b", "norm"]
    assert patterns(names) == ["model.layers.*.a.weight (2)", "model.layers.*.experts.*.b (1)", "norm (1)"]
