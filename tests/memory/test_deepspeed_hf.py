"""DeepSpeed ZeRO with Hugging Face models: single terms, what is refused, and the longest sequence."""

from dataclasses import replace

import pytest

from hydra_dist.errors import ConfigError
from hydra_dist.memory.deepspeed_hf import COMMUNICATOR, estimate_deepspeed, host_bytes, solve_longest
from hydra_dist.memory.deepspeed_hf_allocator import Allocator
from hydra_dist.memory.deepspeed_hf_layer import Layer
from hydra_dist.memory.deepspeed_hf_settings import GPU_BYTES, INDEX_LIMIT, DeepSpeedSettings
from hydra_dist.memory.deepspeed_hf_step import Step, layer_parameters, parameters
from hydra_dist.memory.shapes import DenseDecoder

LLAMA = DenseDecoder(
    num_layers=32,
    hidden_size=4096,
    ffn_size=14336,
    num_query_heads=32,
    num_key_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_positions=131072,
    tie_embeddings=False,
    gated_mlp=True,
    norm="rmsnorm",
    positions="rope",
    linear_bias=False,
)
SETTINGS = DeepSpeedSettings(
    sequence_length=65536, offload_optimizer=True, offload_parameters=True, fused_kernels=True, cross_entropy="fused"
)
TERABYTE = 10**12


def estimate(model=LLAMA, **changes):
    return estimate_deepspeed(model, replace(SETTINGS, **changes))


def per_token(less=65536, more=131072, **changes):
    """Allocated bytes that one token of a rank adds."""
    step = more - less
    low, high = (estimate(sequence_length=length, **changes).allocated for length in (less, more))
    return (high - low) / step


def test_parameters_of_llama_are_as_published():
    assert parameters(LLAMA) == 8_030_261_248
    assert layer_parameters(LLAMA) == 218_112_000


def test_metrics_are_ordered():
    memory = estimate()
    assert memory.allocated < memory.reserved < memory.device


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("ranks", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("offload", [True, False])
def test_every_tensor_of_a_step_is_freed(kernels, tiled, ranks, offload):
    for qk_norm in (False, True):
        settings = replace(
            SETTINGS,
            num_gpus=ranks,
            sequence_parallel_size=ranks,
            fused_kernels=kernels,
            tiled_mlp=tiled,
            offload_checkpoints=offload,
        )
        step = Step(replace(LLAMA, num_layers=3, qk_norm=qk_norm), settings)
        memory = step.play()
        left = {name: size for name, size in memory.live.items() if size and name not in step.kept}
        assert left.keys() == {"batch"}


def test_a_checkpointed_token_costs_its_layer_inputs():
    difference = per_token() - per_token(offload_checkpoints=True)
    assert difference == pytest.approx(2 * 4096 * (LLAMA.num_layers - 1), rel=0.01)


def test_a_layer_in_backward_holds_what_its_operations_save():
    hidden, key, ffn = 2 * 4096, 2 * 1024, 2 * 14336
    saved = 5 * hidden + 2 * key + 3 * ffn + 4 * 32  # n1, q, attention, h2, n2; k, v; gate, up, product; lse
    around = 3 * hidden + ffn  # input, output and its gradient; the product's gradient
    batch = 3 * 8 + 2 * 2 * 128
    assert per_token(offload_checkpoints=True) == pytest.approx(saved + around + batch, rel=1e-3)


def test_a_tiled_mlp_leaves_attention_as_the_peak():
    memory = estimate(tiled_mlp=True, offload_checkpoints=True, sequence_length=1_048_576)
    assert "attention's backward" in memory.limiting.parts
    untiled = estimate(offload_checkpoints=True, sequence_length=1_048_576)
    assert "attention's backward" not in untiled.limiting.parts
    assert memory.allocated < 0.75 * untiled.allocated


def test_a_plain_loss_costs_12_bytes_a_logit():
    plain = per_token(cross_entropy="plain")
    assert plain == pytest.approx(12 * 128256 + 2 * 4096 * 33, rel=0.02)
    assert per_token() < 0.3 * plain
    assert per_token(cross_entropy="chunked") == pytest.approx(per_token(), rel=1e-3)


def test_a_loss_over_chunks_holds_the_head_and_two_gradients_of_it():
    """TRL 1.13: 3.03 GB for 256 tokens, a vocabulary of 248,320 and a width of 2,048, forward and backward."""
    model = replace(LLAMA, num_layers=1, hidden_size=2048, vocab_size=248_320)
    memory = estimate(model, sequence_length=256, cross_entropy="chunked", offload_optimizer=False)
    loss = next(phase for phase in memory.rank.phases if phase.name == "loss")
    size = sum(loss.parts[name] for name in ("gathered parameters", "weight gradients", "loss"))
    assert size == pytest.approx(3.03 * 2**30, rel=0.03)


def test_key_heads_are_repeated_where_ranks_outnumber_them():
    def keys(ranks):
        settings = replace(SETTINGS, num_gpus=ranks, sequence_parallel_size=ranks, sequence_length=ranks * 4096)
        memory = Allocator()
        layer = Layer(LLAMA, settings, memory)
        memory.allocate("x", layer.hidden, "checkpoints")
        layer.forward(keep=True)
        return memory._blocks["kg"].size

    assert keys(8) == keys(4) == 4096 * 2 * 1024
    assert keys(32) == 4 * keys(8)


def test_ulysses_costs_copies():
    one, eight = per_token(), per_token(65536 * 8, 131072 * 8, num_gpus=8, sequence_parallel_size=8)
    assert 0 < 8 * eight - one <= 2 * 8192
    alone, shared = estimate(), estimate(num_gpus=8, sequence_parallel_size=8, sequence_length=8 * 65536)
    assert shared.outside["communication"] - alone.outside["communication"] == COMMUNICATOR


def test_gradients_summed_in_fp32_take_4_gb_of_the_default_bucket():
    narrow, wide = (
        estimate(sequence_length=4096, num_gpus=8, reduction_bytes=size, cross_entropy="chunked") for size in (2, 4)
    )
    assert wide.reserved - narrow.reserved == pytest.approx(3e9, rel=0.02)  # 4 GB instead of 1


def test_zero_2_keeps_whole_parameters_and_its_share_of_the_rest():
    memory = estimate(zero_stage=2, offload_parameters=False, offload_optimizer=False, num_gpus=8, sequence_length=1024)
    shard = parameters(LLAMA) / 8
    kept = memory.rank.kept
    assert kept["parameter shards"] == 2 * parameters(LLAMA)
    assert kept["optimizer shards"] == pytest.approx(12 * shard, rel=1e-6)
    assert kept["gradient shards"] == pytest.approx(2 * shard, rel=1e-6)
    assert "gathered parameters" not in memory.rank.phases[0].parts


def test_the_host_holds_checkpoints_of_all_its_ranks():
    settings = replace(SETTINGS, num_gpus=16, sequence_parallel_size=16, sequence_length=1_600_000)
    offloaded = replace(settings, offload_checkpoints=True)
    assert host_bytes(LLAMA, settings)["checkpoints"] == 0
    assert host_bytes(LLAMA, offloaded)["checkpoints"] == 8 * 32 * 100_000 * 8192
    pinned = host_bytes(LLAMA, replace(offloaded, pinned_checkpoints=True))
    assert pinned["checkpoints"] == 8 * 32 * 2**30  # 819 MB, as a power of two


def test_the_host_holds_what_deepspeed_says_of_its_states():
    host = host_bytes(LLAMA, replace(SETTINGS, num_gpus=8, offload_parameters=False))
    assert sum(host.values()) == pytest.approx(parameters(LLAMA) * 16 * 1.5, rel=1e-6)
    host = host_bytes(LLAMA, SETTINGS)
    assert sum(host.values()) == pytest.approx(parameters(LLAMA) * 18 * 1.5, rel=1e-6)


def test_the_longest_fits_and_little_more_does_not():
    longest = solve_longest(LLAMA, SETTINGS, GPU_BYTES["H100-80"], 2 * TERABYTE)
    assert longest.limit == "gpu"
    assert longest.memory.device <= GPU_BYTES["H100-80"]
    assert estimate(sequence_length=longest.sequence_length * 101 // 100).device > GPU_BYTES["H100-80"]


def test_the_longest_names_the_host_and_the_index_where_they_are_short():
    settings = replace(SETTINGS, offload_checkpoints=True, tiled_mlp=True)
    assert solve_longest(LLAMA, settings, GPU_BYTES["H200"], TERABYTE // 4).limit == "host"
    narrow = solve_longest(LLAMA, replace(settings, wide_indices=False), GPU_BYTES["H200"], 9 * TERABYTE)
    assert narrow.limit == "index"
    assert narrow.sequence_length * LLAMA.hidden_size < INDEX_LIMIT
    assert solve_longest(LLAMA, settings, GPU_BYTES["H200"], 9 * TERABYTE).limit == "gpu"


def test_where_nothing_fits_there_is_no_longest():
    with pytest.raises(ConfigError, match="not even 128 tokens a rank fit, for lack of host memory"):
        solve_longest(LLAMA, SETTINGS, GPU_BYTES["H100-80"], TERABYTE // 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_gpus": 0}, "deepspeed.num_gpus 0 is not positive"),
        ({"num_gpus": 6, "sequence_parallel_size": 4}, "sequence_parallel_size 4 does not divide"),
        ({"zero_stage": 2}, "offload_parameters needs ZeRO-3"),
        ({"num_gpus": 12, "sequence_parallel_size": 12}, "does not split 32 query heads and 8 key heads"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ConfigError, match=message):
        estimate(**changes)


def test_a_model_that_is_no_llama_is_refused():
    with pytest.raises(ConfigError, match="must be rmsnorm, true and rope"):
        estimate(replace(LLAMA, norm="layernorm"))
