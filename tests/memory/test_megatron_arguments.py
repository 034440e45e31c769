"""Megatron-LM's options as shape and settings, and what is refused."""

import pytest

from hydra_dist.errors import ConfigError
from hydra_dist.memory.megatron_arguments import REQUIRED, read_arguments

BASE = {
    "num-layers": 32,
    "hidden-size": 4096,
    "num-attention-heads": 32,
    "vocab-size": 131073,
    "max-position-embeddings": 8192,
    "seq-length": 8192,
    "micro-batch-size": 2,
    "global-batch-size": 8,
    "bf16": True,
}


def read(gpus=8, gpu="H100", overrides=None, **changes):
    arguments = BASE | {name.replace("_", "-"): value for name, value in changes.items()}
    return read_arguments(arguments, gpus, gpu, **(overrides or {}))


def test_defaults_are_megatrons():
    model, settings = read()
    assert (model.ffn_size, model.num_key_heads, model.head_dim) == (16384, 32, 128)
    assert model.tie_embeddings
    assert model.linear_bias
    assert model.positions == "learned"
    assert model.norm == "layernorm"
    assert (settings.data_parallel_size, settings.num_micro_batches) == (8, 1)
    assert (settings.attention_dropout, settings.hidden_dropout, settings.recompute) == (0.1, 0.1, "none")
    assert settings.gradient_accumulation_fusion
    assert settings.attention_mask


def test_a_llama():
    model, settings = read(
        swiglu=True,
        group_query_attention=True,
        num_query_groups=8,
        normalization="RMSNorm",
        position_embedding_type="rope",
        disable_bias_linear=True,
        untie_embeddings_and_output_weights=True,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        pipeline_model_parallel_size=2,
        num_layers_per_virtual_pipeline_stage=4,
        recompute_activations=True,
    )
    assert (model.ffn_size, model.num_key_heads, model.qkv_bias) == (10880, 8, False)
    assert (settings.num_model_chunks, settings.data_parallel_size, settings.num_micro_batches) == (4, 2, 2)
    assert settings.sequence_parallel
    assert settings.recompute == "selective"


@pytest.mark.parametrize(
    ("gpu", "options", "expected"),
    [
        ("A100", {}, "flash"),
        ("H100", {}, "fused"),
        ("H200", {"deterministic_mode": True}, "fused"),
        ("GB200", {}, "fused"),
        ("GB200", {"deterministic_mode": True}, "flash"),
        ("H100", {"attention_backend": "flash"}, "flash"),
        ("A100", {"attention_backend": "unfused"}, "unfused"),
        ("A100", {"transformer_impl": "local"}, "local"),
        ("A100", {"transformer_impl": "local", "use_flash_attn": True}, "flash"),
    ],
)
def test_who_computes_attention(gpu, options, expected):
    assert read(gpu=gpu, **options)[1].attention == expected


def test_a_padded_vocabulary_is_taken_as_it_is():
    arguments = {name: value for name, value in BASE.items() if name != "vocab-size"}
    model, settings = read_arguments(arguments | {"padded-vocab-size": 131200}, 8, "H100")
    assert settings.padded_vocab(model) == 131200
    model, settings = read(tensor_model_parallel_size=4)
    assert settings.padded_vocab(model) == 131584
    model, settings = read(make_vocab_size_divisible_by=8)
    assert settings.padded_vocab(model) == 131080


def test_overrides_hold_against_options():
    assert read(overrides={"attention": "unfused"}, attention_backend="flash")[1].attention == "unfused"


def test_precision_of_gradients_and_optimizer():
    assert read(grad_reduce_in_bf16=True)[1].gradient_bytes == 2
    settings = read(main_params_dtype="fp16", exp_avg_dtype="fp8", exp_avg_sq_dtype="bf16", main_grads_dtype="bf16")[1]
    assert (settings.main_parameter_bytes, settings.moment_bytes, settings.gradient_bytes) == (2, (1, 2), 2)
    assert read()[1].gradient_bytes is None


@pytest.mark.parametrize("option", REQUIRED)
def test_what_memory_depends_on_is_asked_for(option):
    with pytest.raises(ConfigError, match=f"--{option} is missing"):
        read_arguments({name: value for name, value in BASE.items() if name != option}, 8, "H100")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 8}, "a mixture of experts"),
        ({"multi_latent_attention": True}, "multi-latent attention"),
        ({"hybrid_layer_pattern": "M-M*"}, "state-space"),
        ({"use_megatron_fsdp": True}, "fully sharded"),
        ({"mtp_num_layers": 1}, "multi-token prediction"),
        ({"optimizer": "muon"}, "--optimizer muon .* adam is"),
        ({"bf16": False}, "fp32 are not estimated .* --bf16 and --fp16 are"),
        ({"position_embedding_type": "mrope"}, "--position-embedding-type mrope"),
        ({"recompute_granularity": "selective", "recompute_modules": "moe_act"}, "--recompute-modules moe_act"),
        ({"exp_avg_dtype": "int4"}, "--exp-avg-dtype int4"),
        ({"tensor_model_parallel_size": 3}, "8 GPUs are not a multiple"),
    ],
)
def test_what_the_closed_forms_do_not_cover_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        read(**options)


def test_a_switch_that_is_off_is_not_refused():
    assert read(num_experts=None, multi_latent_attention=False) == read()
