"""A model of Hugging Face transformers over emulated ranks, against the same model alone."""

from itertools import pairwise

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from hydra_dist.context import ContextParallel, run_ranks
from hydra_dist.drop_in import attend_over_ranks, use_in_transformers
from hydra_dist.errors import ConfigError

LENGTH = 37
STARTS = torch.tensor([[0] * 9 + [9] * 20 + [29] * 8, [0] * 37])
TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GRIDS = [("ring", "zigzag", (3, 1)), ("all_gather", "balanced", (3, 1)), ("hybrid", "contiguous", (2, 2))]


@pytest.fixture(autouse=True)
def tokens():
    return torch.randint(50, (2, LENGTH + 1))


def llama(**settings):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY, **settings)).double()


def alone(model, tokens, starts=None, ages=False):
    """Logits and gradients of a plain model; document by document where there are some.

    ``ages``: positions start anew in each document. (transformers makes angles in fp32, whatever the model's dtype.)
    """
    model.set_attn_implementation("sdpa")
    logits = torch.empty(2, LENGTH, 50, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        cuts = [0, LENGTH] if starts is None else [*starts[row].unique().tolist(), LENGTH]
        for start, stop in pairwise(cuts):
            first = 0 if ages else start
            positions = torch.arange(first, first + stop - start)[None]
            part = {"input_ids": tokens[row : row + 1, start:stop], "position_ids": positions}
            out = model(**part, use_cache=False).logits
            logits[row, start:stop] = out.detach()[0]
            total = total + nll(out, tokens[row : row + 1, start + 1 : stop + 1])
    total.backward()
    return logits, taken(model)


def nll(logits, targets):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def taken(model):
    """The gradients, which the model then has no longer."""
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found


def over_ranks(model, tokens, strategy, layout, ranks, starts=None, ages=False):
    """The same with local rows; the ranks share one model, in which their gradients add up."""
    use_in_transformers(model)

    def one_rank(mesh):
        seq = ContextParallel(mesh, strategy, layout).plan(LENGTH, starts)
        inputs, targets = seq.shard(tokens[:, :-1], 1), seq.shard(tokens[:, 1:], 1)
        positions = seq.ages if ages else seq.positions[None]
        logits = model(input_ids=inputs, position_ids=positions, sequence_plan=seq, use_cache=False).logits
        nll(logits, targets).backward()
        return seq.unshard(logits.detach(), 1)

    logits = run_ranks(ranks, one_rank, timeout=30)[0]
    return logits, taken(model)


def largest_error(found, wanted, relative_error):
    pairs = zip([found[0], *found[1]], [wanted[0], *wanted[1]], strict=True)
    return max(relative_error(a, b) for a, b in pairs)


@pytest.mark.parametrize("starts", [None, STARTS], ids=["one document", "documents"])
@pytest.mark.parametrize(("strategy", "layout", "ranks"), GRIDS)
def test_logits_and_gradients_are_those_of_the_model_alone(strategy, layout, ranks, starts, tokens, relative_error):
    model = llama()
    wanted = alone(model, tokens, starts)
    assert largest_error(over_ranks(model, tokens, strategy, layout, ranks, starts), wanted, relative_error) < 1e-10
    if starts is not None:
        anew = alone(model, tokens, starts, ages=True)
        found = over_ranks(model, tokens, strategy, layout, ranks, starts, ages=True)
        assert largest_error(found, anew, relative_error) < 1e-10
        assert largest_error(anew, wanted, relative_error) < 1e-5
        wrong = over_ranks(model, tokens, strategy, layout, ranks, None)
        assert largest_error(wrong, wanted, relative_error) > 1e-3


def test_a_sliding_window_of_the_model_holds_over_ranks(tokens, relative_error):
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**TINY, sliding_window=7)).double()
    wanted = alone(model, tokens)
    assert largest_error(over_ranks(model, tokens, *GRIDS[0]), wanted, relative_error) < 1e-10
    model.config.sliding_window = 8
    for layer in model.model.layers:
        layer.self_attn.config.sliding_window = 8
    assert largest_error(over_ranks(model, tokens, *GRIDS[0]), wanted, relative_error) > 1e-3


def test_local_positions_would_be_wrong(tokens, relative_error, monkeypatch):
    model = llama()
    wanted = alone(model, tokens)
    use_in_transformers(model)

    def one_rank(mesh):
        seq = ContextParallel(mesh, layout="zigzag").plan(LENGTH)
        logits = model(input_ids=seq.shard(tokens[:, :-1], 1), sequence_plan=seq, use_cache=False).logits
        return seq.unshard(logits.detach(), 1)

    assert relative_error(run_ranks(3, one_rank)[0], wanted[0]) > 1e-3


def test_the_models_own_loss_adds_up_over_ranks(tokens):
    model = llama()
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    wanted = nll(logits, tokens[:, 1:]) / tokens[:, 1:].numel()
    use_in_transformers(model)

    def one_rank(mesh, **how):
        seq = ContextParallel(mesh).plan(LENGTH)
        inputs, targets = seq.shard(tokens[:, :-1], 1), seq.shard(tokens[:, 1:], 1)
        plain = {"position_ids": seq.positions[None], "sequence_plan": seq, "use_cache": False}
        shifted = {"shift_labels": targets, "num_items_in_batch": 2 * LENGTH}
        return float(model(input_ids=inputs, labels=targets, **plain, **{**shifted, **how}).loss.detach())

    assert sum(run_ranks(3, one_rank)) == pytest.approx(float(wanted.detach()), rel=1e-6)  # the model's loss is in fp32
    wrong = sum(run_ranks(3, lambda mesh: one_rank(mesh, shift_labels=None)))
    assert wrong != pytest.approx(float(wanted.detach()), rel=1e-3)


def test_what_cannot_be_followed_is_refused(tokens):
    model = llama(attention_dropout=0.1)
    use_in_transformers(model)
    seq = ContextParallel().plan(LENGTH)
    call = {"input_ids": tokens[:, :-1], "use_cache": False}
    with pytest.raises(ConfigError, match=r"without sequence_plan=; what ContextParallel.plan\(\) returns works"):
        model(**call)
    with pytest.raises(ConfigError, match=r"attention dropout 0.1 .* attention_dropout=0.0 works"):
        model.train()(**call, sequence_plan=seq)
    assert model.eval()(**call, sequence_plan=seq).logits.shape == (2, LENGTH, 50)
    for mask in (torch.ones(2, LENGTH), torch.zeros(2, 1, LENGTH, LENGTH)):
        with pytest.raises(ConfigError, match="attention_mask cannot be followed over ranks; documents in the plan"):
            model(**call, sequence_plan=seq, attention_mask=mask)
    x = torch.randn(1, 4, LENGTH, 8)
    for name in ("softcap", "s_aux", "cu_seq_lens_q"):
        with pytest.raises(ConfigError, match=f"{name} does not exist in attention over ranks"):
            attend_over_ranks(model, x, x, x, None, sequence_plan=seq, **{name: 1.0})
    with pytest.raises(ValueError, match="has 36 rows and this rank holds 37"):
        model(input_ids=tokens[:, 2:], use_cache=False, sequence_plan=seq)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.nn.Linear(2, 2), "Linear is not a transformers.PreTrainedModel"),
        (lambda: BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=8, n_layer=1, n_head=2)), "BloomForCausalLM"),
        (
            lambda: JambaForCausalLM(JambaConfig(**TINY, num_experts=2)),
            r"model.layers.0.mamba.conv1d is a convolution over rows",
        ),
        (
            lambda: MistralForCausalLM(MistralConfig(**TINY, layer_types=["full_attention", "linear_attention"])),
            "linear_attention layers look across rows",
        ),
        (
            lambda: llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rope_type dynamic depends on the longest position",
        ),
    ],
    ids=["no model", "own attention", "convolutions", "other layers", "dynamic rope"],
)
def test_models_that_would_be_wrong_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        use_in_transformers(make())


def test_a_bidirectional_model_stays_one(relative_error):
    torch.manual_seed(0)
    settings = {key: value for key, value in TINY.items() if key != "num_key_value_heads"}
    model = BertModel(BertConfig(**settings), add_pooling_layer=False).double().eval()
    x = torch.randn(1, LENGTH, 32, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(inputs_embeds=x).last_hidden_state
        use_in_transformers(model)

        def one_rank(mesh):
            seq = ContextParallel(mesh).plan(LENGTH)
            positions = seq.positions[None]
            return seq.unshard(
                model(inputs_embeds=seq.shard(x, 1), position_ids=positions, sequence_plan=seq).last_hidden_state, 1
            )

        assert relative_error(run_ranks(3, one_rank)[0], wanted) < 1e-10
