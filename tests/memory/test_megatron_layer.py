"""What a layer keeps: against the published formula, and switch by switch."""

import pytest

from hydra_dist.memory.megatron_layer import attention_bytes, dropout_bytes, layer_bytes, mlp_bytes, norm_bytes

TOKENS = 4 * 1024
STREAM = 2 * TOKENS * 512
"""The residual stream in bf16."""


def without_statistics(model, settings):
    """Bytes of what is as wide as the model or its scores: row statistics are 16 bytes a token, an lse 4 a head."""
    total = sum(layer_bytes(model, settings).values()) - 16 * settings.residual_tokens
    if settings.attention in ("flash", "fused"):
        total -= 4 * settings.tokens * model.num_query_heads // settings.tensor_parallel_size
    return total


@pytest.mark.parametrize("split", [1, 2, 4, 8])
def test_equals_korthikanti_equation_4_under_sequence_parallelism(gpt, settings, split):
    """s b h (34 + 5 a s / h) / t; Korthikanti et al. 2022 (arXiv 2205.05198)."""
    chosen = settings(tensor_parallel_size=split, sequence_parallel=True, attention="unfused")
    expected = TOKENS * 512 * (34 + 5 * 8 * 1024 / 512) / split
    assert without_statistics(gpt(), chosen) == expected


@pytest.mark.parametrize("split", [2, 8])
def test_equals_korthikanti_equation_2_without_sequence_parallelism(gpt, settings, split):
    """s b h (10 + 24 / t), the scores recomputed."""
    chosen = settings(tensor_parallel_size=split)
    assert without_statistics(gpt(), chosen) == TOKENS * 512 * (10 + 24 / split)
    sequence_parallel = settings(tensor_parallel_size=split, sequence_parallel=True)
    assert without_statistics(gpt(), sequence_parallel) != TOKENS * 512 * (10 + 24 / split)


def test_flash_attention_copies_its_result_unless_the_batch_is_one_row(gpt, settings):
    fused, flash = settings(attention="fused"), settings(attention="flash")
    assert attention_bytes(gpt(), flash) - attention_bytes(gpt(), fused) == STREAM
    fused, flash = settings(attention="fused", micro_batch_size=1), settings(attention="flash", micro_batch_size=1)
    assert attention_bytes(gpt(), flash) == attention_bytes(gpt(), fused)


def test_grouped_queries_keep_narrower_keys_and_no_rank_less_than_a_head(gpt, settings):
    narrow = gpt(num_key_heads=2)
    assert attention_bytes(gpt(), settings()) - attention_bytes(narrow, settings()) == 2 * 2 * TOKENS * (512 - 128)
    chosen = settings(tensor_parallel_size=8)
    one_head = 2 * TOKENS * 64
    assert attention_bytes(narrow, chosen) == 4 * one_head + 4 * TOKENS


def test_dropout_leaves_masks_of_a_byte(gpt, settings):
    assert dropout_bytes(gpt(), settings()) == 2 * TOKENS * 512
    assert dropout_bytes(gpt(), settings(hidden_dropout=0.0)) == 0
    kept = attention_bytes(gpt(), settings(attention="unfused"))
    without = attention_bytes(gpt(), settings(attention="unfused", attention_dropout=0.0))
    assert kept - without == 3 * TOKENS * 8 * 1024


def test_a_softmax_outside_its_kernel_is_kept_in_fp32(gpt, settings):
    kernel, plain = settings(attention="local"), settings(attention="local", fused_softmax=False)
    assert attention_bytes(gpt(), plain) - attention_bytes(gpt(), kernel) == 2 * TOKENS * 8 * 1024


def test_a_gated_mlp_keeps_gate_up_and_product_and_plain_operations_one_more(gpt, settings):
    model = gpt(gated_mlp=True)
    assert mlp_bytes(model, settings()) == 3 * 2 * TOKENS * 2048
    assert mlp_bytes(model, settings(fused_activation=False)) == 4 * 2 * TOKENS * 2048
    assert mlp_bytes(gpt(), settings(fused_activation=False)) == 2 * 2 * TOKENS * 2048


def test_context_parallelism_keeps_a_share_of_the_rows(gpt, settings):
    whole, half = layer_bytes(gpt(), settings()), layer_bytes(gpt(), settings(context_parallel_size=2))
    assert {name: size // 2 for name, size in whole.items()} == half


def test_selective_recomputation_drops_what_it_names(gpt, settings):
    def chosen(*modules):
        return settings(attention="unfused", recompute="selective", recompute_modules=modules)

    assert attention_bytes(gpt(), chosen("core_attn")) == 4 * STREAM
    assert mlp_bytes(gpt(), chosen("mlp")) == 0
    whole = norm_bytes(gpt(), settings())
    assert whole - norm_bytes(gpt(), chosen("layernorm")) == 2 * STREAM
    assert whole - norm_bytes(gpt(), chosen("mlp")) == STREAM
    assert norm_bytes(gpt(), chosen("core_attn")) == whole


def test_eight_bits_halve_what_products_read(gpt, settings):
    bf16, fp8 = layer_bytes(gpt(), settings()), layer_bytes(gpt(), settings(fp8=True))
    assert bf16["norms"] - fp8["norms"] == STREAM
    assert bf16["mlp"] - fp8["mlp"] == 2 * STREAM
    assert fp8["attention"] - bf16["attention"] == STREAM // 2
