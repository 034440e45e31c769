"""Whole runs to folders in transformers' names and back: files, tokenizer, training that goes on, what is refused."""

import json
import shutil

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hydra_dist.config import ModelConfig
from hydra_dist.config.file import load_config
from hydra_dist.context import ContextParallel
from hydra_dist.data import Dataset, Sampler, byte_tokenizer
from hydra_dist.errors import ConfigError, RunError
from hydra_dist.export import export_run, import_run
from hydra_dist.model import Transformer, initialize
from hydra_dist.train import checkpoint
from hydra_dist.train.sample import load_model, sample

SMALL = {"vocab_size": 258, "num_layers": 2, "hidden_size": 32, "head_dim": 8, "num_query_heads": 4, "num_key_heads": 2}
LLAMA = {**SMALL, "attention": "gqa", "rope_fraction": 1.0}


class Weights:
    """A model's weights in an engine's place."""

    stage, step = 0, 0

    def __init__(self, model):
        self.tensors = dict(model.named_parameters())
        self.names = list(self.tensors)

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def keys(self, name):
        return ("weight",)

    def dtype(self, name, key):
        return torch.float32

    def read_tensor(self, name, key, wanted=True):
        return self.tensors[name].detach() if wanted else None


@pytest.fixture
def make_run(tmp_path):
    """A run's folder with checkpoints of random weights; the models by step."""

    def make(settings, steps=(3,), name="run"):
        config = ModelConfig.model_validate(settings)
        models = {}
        for step in steps:
            models[step] = Transformer(config)
            initialize(models[step], seed=step)
            metadata = {
                "data_step": step,
                "context_size": 1,
                "precision": "fp32",
                "model": config.model_dump(mode="json"),
                "extra": {"data.sequence_length": 128},
            }
            root = tmp_path / name / "checkpoints"
            checkpoint.save(root, step, Weights(models[step]), metadata=metadata, keep=9)
        (tmp_path / name / "tokenizer.json").write_text(byte_tokenizer().to_json(), encoding="utf-8")
        return tmp_path / name, models

    return make


def logits(model, ids):
    with torch.no_grad():
        return model(ids)


def ids():
    return torch.randint(0, 258, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_run_that_transformers_reads(make_run, tmp_path, shard):
    run, models = make_run(LLAMA, steps=(1, 2))
    said = export_run(run, tmp_path / "hf", max_shard_size=shard)
    assert "step-00000002" in said
    assert "llama" in said
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == (shard == "20KB")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    expected = logits(models[2], ids())
    error = (theirs(ids()).logits - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5
    assert theirs.config.max_position_embeddings == 128

    export_run(run, tmp_path / "older", step=1)
    older = LlamaForCausalLM.from_pretrained(tmp_path / "older")
    assert (older(ids()).logits - expected).abs().max() / expected.abs().max() > 1e-2


def test_the_tokenizer_goes_with_it(make_run, tmp_path):
    run, _ = make_run(LLAMA)
    export_run(run, tmp_path / "hf")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), byte_tokenizer()
    text = "naïve, and\n so on"
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text).tolist()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (ours.begin_id, ours.end_id)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.begin_id, ours.end_id)


def test_bfloat16_is_the_weights_rounded(make_run, tmp_path):
    run, models = make_run(LLAMA)
    export_run(run, tmp_path / "hf", dtype="bfloat16")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    expected = models[3].layers[0].attention.output.weight.to(torch.bfloat16)
    assert torch.equal(theirs.model.layers[0].self_attn.o_proj.weight, expected)


@pytest.mark.parametrize("settings", [LLAMA, {**LLAMA, "tie_embeddings": False}], ids=["tied", "untied"])
def test_there_and_back_is_the_same_run(settings, make_run, tmp_path):
    run, models = make_run(settings)
    export_run(run, tmp_path / "hf", max_shard_size="20KB")
    said = import_run(tmp_path / "hf", tmp_path / "back")
    assert "left out" not in said
    assert "starting values" not in said
    back = load_model(tmp_path / "back", torch.device("cpu"))
    assert all(
        torch.equal(weight, dict(back.named_parameters())[name]) for name, weight in models[3].named_parameters()
    )
    for text in ("a", "the ring"):
        assert sample(run, text, 8) == sample(tmp_path / "back", text, 8)
    section = yaml.safe_load((tmp_path / "back" / "model.yaml").read_text())
    assert ModelConfig.model_validate(section["model"]) == back.config


def test_a_zaya_starts_its_mlps_and_says_so(make_run, tmp_path):
    run, models = make_run({**SMALL, "temperature": "raw"})
    with pytest.raises(ConfigError, match=r"no counterpart for layers\.\*\.mlp\.down\.weight"):
        export_run(run, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    said = export_run(run, tmp_path / "hf", skip_unmatched=True)
    assert "left out: layers.*.mlp.down.weight (2), layers.*.mlp.gate_up.weight (2)" in said
    with pytest.raises(ConfigError, match="of the dense MLPs of our layers"):
        import_run(tmp_path / "hf", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    said = import_run(tmp_path / "hf", tmp_path / "back", skip_unmatched=True)
    assert "with starting values: layers.*.mlp.down.weight (2), layers.*.mlp.gate_up.weight (2)" in said
    back = dict(load_model(tmp_path / "back", torch.device("cpu")).named_parameters())
    started = Transformer(ModelConfig.model_validate({**SMALL, "temperature": "raw"}))
    initialize(started, seed=0)
    for name, weight in models[3].named_parameters():
        expected = dict(started.named_parameters())[name] if ".mlp." in name else weight
        assert torch.equal(back[name], expected), name


def test_training_goes_on_from_an_import(make_run, tmp_path, tiny_settings, tiny_corpus, torchrun):
    """The first step of the new run has the loss of the imported weights on that step's rows."""
    run, models = make_run(LLAMA)
    export_run(run, tmp_path / "hf")
    import_run(tmp_path / "hf", tmp_path / "new")
    settings = {**tiny_settings, **yaml.safe_load((tmp_path / "new" / "model.yaml").read_text())}
    settings["run"] = {"directory": str(tmp_path / "new"), "tensorboard": False}
    settings["train"] = {**settings["train"], "steps": 2}
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(settings))
    done = torchrun(1, "-m", "hydra_dist.train", str(tmp_path / "new.yaml"))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]

    config = load_config(tmp_path / "new.yaml")
    rows = Sampler(Dataset(tiny_corpus, "train"), 128, config.train.seed)
    losses_here = {step: first_loss(models[3], rows, step) for step in (0, 1)}
    assert losses[0] == pytest.approx(losses_here[0], rel=1e-5)
    assert losses[0] != pytest.approx(losses_here[1], rel=1e-4)
    assert [path.name for path in (tmp_path / "new" / "checkpoints").glob("step-*")] != []


def first_loss(model, rows, step):
    """Mean loss in nats of a step's one row, documents kept apart."""
    batch = rows.batch(step, [0], 1)
    plan = ContextParallel(None).plan(rows.sequence_length, document_starts=batch.document_starts)
    with torch.no_grad():
        total = model(batch.tokens, plan, targets=batch.targets)
    return float(total) / int((batch.targets >= 0).sum())


# What is refused


def test_checkpoints_that_are_not_there(make_run, tmp_path):
    run, _ = make_run(LLAMA, steps=(2, 4))
    with pytest.raises(ConfigError, match=r"--checkpoint 3: .* has those of steps 2, 4"):
        export_run(run, tmp_path / "hf", step=3)
    with pytest.raises(ConfigError, match="no checkpoint under"):
        export_run(tmp_path / "nowhere", tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"--dtype bfloat: float32 or bfloat16 works \(did you mean"):
        export_run(run, tmp_path / "hf", dtype="bfloat")
    with pytest.raises(ConfigError, match="--max-shard-size big"):
        export_run(run, tmp_path / "hf", max_shard_size="big")
    shutil.copytree(run, tmp_path / "hf")
    with pytest.raises(ConfigError, match="hf is there already"):
        export_run(run, tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "hf"}


def test_a_damaged_checkpoint_is_not_exported(make_run, tmp_path):
    run, _ = make_run(LLAMA)
    shard = next(run.glob("checkpoints/step-*/weights-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(RunError, match="is damaged"):
        export_run(run, tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_vocabulary_that_grows(make_run, tmp_path):
    run, models = make_run({**LLAMA, "tie_embeddings": False})
    export_run(run, tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"--vocab-size 257: .* has 258 entries"):
        import_run(tmp_path / "hf", tmp_path / "new", vocab_size=257)
    said = import_run(tmp_path / "hf", tmp_path / "new", vocab_size=300)
    assert "with starting values: embedding.weight (rows from 258 on), head.weight (rows from 258 on)" in said
    model = load_model(tmp_path / "new", torch.device("cpu"))
    assert torch.equal(logits(model, ids())[..., :258], logits(models[3], ids()))
    assert (model.embedding.weight[258:].std(dim=-1) > 0).all()


def test_a_tokenizer_with_ids_that_the_model_lacks_is_left_behind(tmp_path):
    """One without our special tokens gets them added behind its own."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(byte_tokenizer().to_json(), encoding="utf-8")
    said = import_run(tmp_path / "hf", tmp_path / "small")
    assert "no tokenizer" in said
    assert not (tmp_path / "small" / "tokenizer.json").exists()
    said = import_run(tmp_path / "hf", tmp_path / "enough", vocab_size=258)
    assert "no tokenizer" not in said
    assert len(sample(tmp_path / "enough", "a", 4)) >= 1
