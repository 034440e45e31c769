"""Megatron-LM's closed forms: parameters of published models, the pipeline's schedule, and the phases of a step."""

from dataclasses import replace

import pytest

from hydra_dist.errors import ConfigError
from hydra_dist.memory.megatron import (
    estimate_megatron,
    estimate_stages,
    passes_in_flight,
    recomputed_layers,
    stage_parameters,
)
from hydra_dist.memory.megatron_settings import MegatronSettings
from hydra_dist.memory.result import BETWEEN_STEPS
from hydra_dist.memory.shapes import DenseDecoder

MIB = 2**20
LLAMA = {"gated_mlp": True, "norm": "rmsnorm", "positions": "rope", "linear_bias": False, "tie_embeddings": False}
PUBLISHED = {
    "GPT-2": (DenseDecoder(12, 768, 3072, 12, 12, 64, 50257, 1024), 124_439_808),
    "Llama-2-7B": (DenseDecoder(32, 4096, 11008, 32, 32, 128, 32000, 4096, **LLAMA), 6_738_415_616),
    "Llama-3.1-70B": (DenseDecoder(80, 8192, 28672, 64, 8, 128, 128256, 8192, **LLAMA), 70_553_706_496),
    "Qwen2.5-7B": (DenseDecoder(28, 3584, 18944, 28, 4, 128, 152064, 32768, qkv_bias=True, **LLAMA), 7_615_616_512),
    "Qwen3-8B": (DenseDecoder(36, 4096, 12288, 32, 8, 128, 151936, 32768, qk_norm=True, **LLAMA), 8_190_735_360),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name):
    model, count = PUBLISHED[name]
    assert stage_parameters(model, MegatronSettings(1024, vocab_multiple=1), 0) == count
    assert (
        stage_parameters(
            replace(model, norm="layernorm" if model.norm == "rmsnorm" else "rmsnorm"),
            MegatronSettings(1024, vocab_multiple=1),
            0,
        )
        != count
    )


def test_a_tied_embedding_stands_on_the_first_and_the_last_stage(gpt, settings):
    vocab, chosen = 50304 * 512, settings(pipeline_parallel_size=4)
    first, second, _, last = (stage_parameters(gpt(), chosen, stage) for stage in range(4))
    assert first - second == vocab + 1024 * 512
    assert last - second == vocab + 2 * 512
    assert stage_parameters(gpt(tie_embeddings=False), chosen, 3) == last
    alone = [stage_parameters(gpt(tie_embeddings=tied), settings(), 0) for tied in (True, False)]
    assert alone[1] - alone[0] == vocab


def test_the_vocabulary_is_padded_for_tensor_parallelism(gpt, settings):
    assert settings().padded_vocab(gpt()) == 50304
    assert settings(tensor_parallel_size=2).padded_vocab(gpt()) == 50432
    assert settings(tensor_parallel_size=4).padded_vocab(gpt()) == 50688


def test_eighteen_bytes_a_parameter_and_what_the_distributed_optimizer_saves(gpt, settings):
    count = stage_parameters(gpt(), settings(), 0)

    def state(**changes):
        kept = estimate_megatron(gpt(), settings(**changes)).kept
        return kept["parameters"] + kept["gradients"] + kept["optimizer"]

    assert state() == state(data_parallel_size=4) == 18 * count
    assert state(data_parallel_size=4, distributed_optimizer=True) == 9 * count
    assert state(data_parallel_size=4, context_parallel_size=2, distributed_optimizer=True) == 7.5 * count
    assert state(data_parallel_size=4, distributed_optimizer=True, num_optimizer_instances=2) == 12 * count
    assert state(precision="fp16") == 16 * count
    assert state(gradient_bytes=2, main_parameter_bytes=2, moment_bytes=(2, 1)) == 9 * count


def test_eight_bit_parameters_on_hopper_have_a_copy_for_each_direction(gpt, settings):
    def parameters(**changes):
        return estimate_megatron(gpt(), settings(**changes)).kept["parameters"]

    matrices = 8 * 12 * 512 * 512
    assert parameters(fp8=True) - parameters() == 2 * matrices
    assert parameters(fp8=True, fp8_parameters=True) == parameters()
    assert parameters() - parameters(fp8=True, fp8_parameters=True, gpu="GB200") == matrices


@pytest.mark.parametrize(("stage", "expected"), [(0, (4,)), (1, (3,)), (3, (1,))])
def test_passes_in_flight_without_interleaving(settings, stage, expected):
    assert passes_in_flight(settings(pipeline_parallel_size=4), stage) == expected


def test_passes_in_flight_are_no_more_than_the_micro_batches(settings):
    assert passes_in_flight(settings(pipeline_parallel_size=4, num_micro_batches=2), 0) == (2,)
    assert passes_in_flight(settings(pipeline_parallel_size=4, num_model_chunks=2, num_micro_batches=4), 0) == (4, 4)


def replay(settings, stage):
    """The schedule itself: forwards ahead of the first backward, then one of each; the most that wait, by chunk."""
    stages, chunks, group = settings.pipeline_parallel_size, settings.num_model_chunks, settings.pipeline_parallel_size
    order = [
        chunk
        for start in range(0, settings.num_micro_batches, group)
        for chunk in range(chunks)
        for _ in range(start, min(start + group, settings.num_micro_batches))
    ]
    ahead = min(2 * (stages - stage - 1) + (chunks - 1) * group, len(order))
    waiting, backward, most = [0] * chunks, iter([chunks - 1 - chunk for chunk in order]), (0, ())
    for index, chunk in enumerate(order):
        waiting[chunk] += 1
        most = max(most, (sum(waiting), tuple(waiting)), key=lambda pair: pair[0])
        if index >= ahead:
            waiting[next(backward)] -= 1
    return most[1]


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("chunks", [2, 3])
def test_passes_in_flight_under_interleaving_are_those_of_the_schedule(settings, stages, chunks):
    chosen = settings(pipeline_parallel_size=stages, num_model_chunks=chunks, num_micro_batches=4 * stages)
    for stage in range(stages):
        assert passes_in_flight(chosen, stage) == replay(chosen, stage)
    assert passes_in_flight(chosen, 0) != passes_in_flight(replace(chosen, num_model_chunks=1), 0)


def test_layers_are_dealt_to_stages_and_chunks(gpt, settings):
    assert settings(pipeline_parallel_size=2, num_model_chunks=2).chunk_layers(gpt()) == ((2, 2), (2, 2))
    uneven = settings(pipeline_parallel_size=4, first_stage_layers=1, last_stage_layers=1)
    assert uneven.chunk_layers(gpt()) == ((1,), (3,), (3,), (1,))
    counted = settings(
        pipeline_parallel_size=4, num_model_chunks=2, embedding_counts_as_layer=True, loss_counts_as_layer=True
    )
    assert counted.chunk_layers(gpt(num_layers=6)) == ((0, 1), (1, 1), (1, 1), (1, 0))


@pytest.mark.parametrize(
    "change", [{"pipeline_parallel_size": 3}, {"pipeline_parallel_size": 4, "num_model_chunks": 3}]
)
def test_layers_that_cannot_be_dealt_are_refused_and_the_suggestion_works(gpt, settings, change):
    with pytest.raises(ConfigError, match="num_layers 8 cannot be dealt"):
        estimate_megatron(gpt(), settings(**change))
    estimate_megatron(gpt(), settings(pipeline_parallel_size=1, num_model_chunks=1))


@pytest.mark.parametrize(("heads", "split"), [((6, 6), 4), ((12, 3), 4)])
def test_heads_that_cannot_be_split_are_refused(gpt, settings, heads, split):
    with pytest.raises(ConfigError, match="tensor_parallel_size 4"):
        estimate_megatron(gpt(num_query_heads=heads[0], num_key_heads=heads[1]), settings(tensor_parallel_size=split))


def test_settings_refuse_what_is_not_positive_or_not_known(settings):
    with pytest.raises(ConfigError, match=r"micro_batch_size 0 is not positive"):
        settings(micro_batch_size=0)
    with pytest.raises(ConfigError, match="context_parallel_size 3"):
        settings(context_parallel_size=3)
    with pytest.raises(ConfigError, match=r"num_optimizer_instances 3 does not divide the 4 ranks"):
        settings(data_parallel_size=4, num_optimizer_instances=3)
    with pytest.raises(ConfigError, match=r"gpu P100 is not known; A100, H100"):
        settings(gpu="P100")


def test_the_last_stage_peaks_at_its_loss_and_the_first_in_a_backward(gpt, settings):
    stages = estimate_stages(gpt(), settings(pipeline_parallel_size=4))
    assert [stage.limiting.name for stage in stages] == ["backward", "backward", "backward", "loss"]
    per_pass = [stage.limiting.parts["mlp"] for stage in stages]
    assert per_pass == [4 * per_pass[3], 3 * per_pass[3], 2 * per_pass[3], per_pass[3]]


def test_logits_at_the_loss(gpt, settings):
    logits = 4 * 1024 * 50304

    def parts(**changes):
        return estimate_megatron(gpt(), settings(**changes)).limiting.parts["logits"]

    assert parts() == 6 * logits
    assert parts(cross_entropy="fused") == parts(cross_entropy="copied") == 10 * logits
    assert parts(cross_entropy="te") == 6 * logits


def test_deferred_head_gradients_wait_for_the_end_of_the_step(gpt, settings):
    def waiting(limit):
        return estimate_megatron(gpt(), settings(deferred_head_gradients=limit)).limiting.parts["deferred head"]

    logits = 2 * 4 * 1024 * 50304
    assert waiting(3) - waiting(2) == logits
    assert waiting(0) - waiting(2) == 6 * logits
    assert "deferred head" not in estimate_megatron(gpt(), settings()).limiting.parts


def test_full_recomputation_keeps_inputs_and_recomputes_a_block(gpt, settings):
    whole = estimate_megatron(gpt(), settings())
    full = estimate_megatron(gpt(), settings(recompute="full"))
    assert full.limiting.parts["checkpoints"] == 8 * 2 * 4 * 1024 * 512
    assert full.peak < whole.peak
    assert recomputed_layers(settings(recompute="full", recompute_num_layers=3), 8) == (8, 3)
    assert recomputed_layers(settings(recompute="full", recompute_num_layers=3, recompute_method="block"), 8) == (3, 3)
    assert recomputed_layers(settings(), 8) == (0, 0)


def test_a_recomputed_layer_is_the_peak_where_the_loss_is_small(gpt, settings):
    chosen = settings(recompute="full", attention="unfused", sequence_length=4096, micro_batch_size=1)
    estimate = estimate_megatron(gpt(vocab_size=256, max_positions=4096), chosen)
    assert estimate.limiting.name == "backward"
    assert estimate.limiting.parts["recomputed"] > 5 * 8 * 4096 * 4096


def test_a_weight_gradient_of_the_head_is_the_peak_where_tokens_are_few(gpt, settings):
    few = settings(micro_batch_size=1, sequence_length=64, gradient_accumulation_fusion=False)
    estimate = estimate_megatron(gpt(num_layers=1), few)
    assert estimate.limiting.name == "head"
    assert estimate.limiting.parts["gradients of the head"] == 2 * (64 * 50304 + 64 * 512 + 50304 * 512)
    assert estimate_megatron(gpt(num_layers=1), replace(few, gradient_accumulation_fusion=True)).limiting.name == "loss"


def test_gradients_inside_a_layer(gpt, settings):
    def gradients(model, **changes):
        stage = estimate_megatron(model, settings(pipeline_parallel_size=2, attention_mask=False, **changes), 0)
        return stage.limiting.parts["gradients of a layer"] - 2 * 4 * 1024 * 512

    width = 2 * 4 * 1024 * 2048
    assert gradients(gpt()) == width
    assert gradients(gpt(), gradient_accumulation_fusion=False) == width + 2 * 2048 * 512
    assert gradients(gpt(gated_mlp=True)) == 2 * width
    assert gradients(gpt(), attention="unfused") == 2 * 4 * 8 * 1024 * 1024 - 2 * width


def test_the_first_step_peaks_before_the_moments_are_there(gpt, settings):
    estimate = estimate_megatron(gpt(), settings())
    assert estimate.peak - estimate.first_peak == 8 * stage_parameters(gpt(), settings(), 0)
    one = estimate_megatron(gpt(), settings(num_micro_batches=1))
    assert one.late - estimate.late == 32 * MIB
    short = estimate_megatron(gpt(vocab_size=256), settings(micro_batch_size=1, sequence_length=64))
    assert short.first_peak == short.steady > short.peak - short.late


def test_steady_is_what_stands_and_what_a_step_leaves(gpt, settings):
    estimate = estimate_megatron(gpt(), settings(pipeline_parallel_size=4, num_model_chunks=2))
    left = next(phase for phase in estimate.phases if phase.name == BETWEEN_STEPS)
    assert left.total == 4 * 2 * 4 * 1024 * 512
    assert estimate.steady == sum(estimate.kept.values()) + left.total < estimate.peak


def test_workspaces(gpt, settings):
    def workspaces(**changes):
        return estimate_megatron(gpt(), settings(**changes)).kept["workspaces"]

    assert workspaces(gpu="H100") == workspaces(gpu="H200") == 96 * MIB
    assert workspaces(gpu="A100", cublas_workspace=32 * MIB) == 68 * MIB
    assert workspaces(transformer_engine=False) == 64 * MIB
    assert workspaces(tensor_parallel_overlap=True) == 192 * MIB


def test_buffers_that_stay(gpt, settings):
    def buffers(**changes):
        return estimate_megatron(gpt(), settings(gradient_accumulation_fusion=False, **changes)).kept["buffers"]

    assert buffers() == 0
    assert buffers(attention="local") == 2 * 4 * 1024 * 8 * 1024
    assert buffers(tensor_parallel_size=2, sequence_parallel=True) == 2 * 4 * 1024 * 512
    fused = estimate_megatron(gpt(), settings()).kept["buffers"]
    assert fused == 2 * (12 * 512 * 512 + 50304 * 512)
