"""Settings that a user may write, what they are turned into, and what is refused with which words."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from hydra_dist.config import UNSUPPORTED, Config
from hydra_dist.config.file import build_config, check_world_size, dump_config, load_config
from hydra_dist.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
PRESETS = sorted((REPOSITORY / "configs").glob("*.yaml"))


def settings(**changes: Any) -> dict[str, Any]:
    """A small configuration with ``section__key`` changes."""
    base: dict[str, Any] = {
        "model": {"num_layers": 2, "hidden_size": 256, "head_dim": 64, "num_query_heads": 4, "num_key_heads": 2},
        "data": {"directory": "data/x", "sequence_length": 64},
        "run": {"directory": "runs/x"},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        base.setdefault(section, {})[name] = value
    return base


def message(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build_config(settings(**changes), "run.yaml")
    text = str(caught.value)
    assert text.startswith("run.yaml: ")
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_every_preset_loads_and_survives_being_written_out(path, tmp_path):
    config = load_config(path)
    written = tmp_path / "resolved.yaml"
    written.write_text(dump_config(config))
    assert load_config(written) == config


@pytest.mark.parametrize(("text", "tokens"), [("8K", 8192), ("1M", 2**20), (100, 100)])
def test_lengths_are_read_as_people_write_them(text, tokens):
    assert build_config(settings(data__sequence_length=text)).data.sequence_length == tokens


@pytest.mark.parametrize("text", ["8Q", "K", "1.5M", -1, 0, "99999999G", True])
def test_lengths_that_are_none_are_refused(text):
    assert "data.sequence_length" in message(data__sequence_length=text)


@pytest.mark.parametrize(
    ("given", "heads"),
    [
        ({"compression_factor": 2}, (12, 12)),
        ({"compression_factor": 3}, (8, 8)),
        ({"compression_factor": 4}, (6, 6)),
        ({"compression_factor": 6}, (4, 4)),
        ({"compression_factor": 8}, (3, 3)),
        ({"compression_factor": 24}, (1, 1)),
        ({"query_compression": 1, "key_compression": 4}, (24, 6)),
        ({"query_compression": 2, "key_compression": 8}, (12, 3)),
        ({"compression_factor": 4, "query_compression": 2}, (12, 6)),
        ({"compression_factor": 4, "key_compression": 8}, (6, 3)),
        ({"compression_factor": 4, "num_query_heads": 18}, (18, 6)),
        ({"key_compression": 5, "num_key_heads": 8}, (24, 8)),
        ({}, (24, 24)),
    ],
)
def test_heads_follow_from_compression_unless_they_are_given(given, heads):
    base = settings()
    base["model"] = {"num_layers": 1, "hidden_size": 1536, "head_dim": 64, **given}
    model = build_config(base).model
    assert (model.num_query_heads, model.num_key_heads) == heads


def test_compression_that_gives_no_whole_heads_names_factors_that_do():
    base = settings()
    base["model"] = {"hidden_size": 256, "head_dim": 64, "compression_factor": 3}
    with pytest.raises(ConfigError, match=r"compression_factor 3 .* no integer; 1 or 2 or 4 work"):
        build_config(base)
    for factor in (1, 2, 4):
        base["model"]["compression_factor"] = factor
        build_config(base)


@pytest.mark.parametrize(
    ("given", "windows"),
    [
        ({}, (None, None, None)),
        ({"window": 64}, (64, 64, 64)),
        ({"layer_windows": [64, None]}, (64, None, 64)),
        ({"layer_windows": [8, None, 16, 32], "window": 64}, (8, None, 16)),
    ],
)
def test_windows_go_round_over_the_layers(given, windows):
    changes = {f"model__{key}": value for key, value in given.items()}
    assert build_config(settings(model__num_layers=3, **changes)).model.windows == windows
    assert "model.layer_windows" in message(model__layer_windows=[])


def test_heads_that_do_not_group_name_counts_that_do():
    text = message(model__num_query_heads=12, model__num_key_heads=5)
    assert "12 is not a multiple of model.num_key_heads 5; 10 or 15 query heads, or 4 key heads, work" in text
    for queries, keys in ((10, 5), (15, 5), (12, 4)):
        build_config(settings(model__num_query_heads=queries, model__num_key_heads=keys))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__num_query_heds": 3}, 'model.num_query_heds: unknown key (did you mean "num_query_heads"?)'),
        ({"model__steps": 3}, "model.steps: unknown key; it belongs in train:"),
        ({"model__zzz": 3}, "model.zzz: unknown key; model has attention, "),
        ({"modle__num_layers": 3}, 'modle: unknown key (did you mean "model"?)'),
        ({"model__num_layers": "3"}, "model.num_layers: '3': input should be a valid integer"),
        ({"model__num_layers": 0}, "model.num_layers: 0: input should be greater than 0"),
        ({"model__induction_layers": [2]}, "model.induction_layers has 2, and the last of 2 layers is 1"),
        (
            {"model__induction_layers": [0], "model__use_convs": False},
            "such a layer needs attention ccgqa with use_convs",
        ),
        ({"model__temperature": "log"}, "model.temperature: 'log': input should be 'exp', 'raw' or 'exp_clamp'"),
        ({"train__mlp_tile_size": 0}, "train.mlp_tile_size: 0: input should be greater than 0"),
        ({"train__activation_offload": "yes"}, "train.activation_offload: 'yes': input should be a valid boolean"),
        ({"zero__stage": 4}, "zero.stage: 4: input should be 0, 1, 2 or 3"),
        ({"context__layout": "stripe"}, "context.layout: 'stripe': input should be 'zigzag', 'contiguous', "),
        ({"context__size": 64}, "data.sequence_length 64 is shorter than the 128 pieces"),
        ({"optimizer__learning_rate": float("nan")}, "optimizer.learning_rate"),
        ({"optimizer__weight_decay": float("inf")}, "optimizer.weight_decay"),
        ({"optimizer__betas": [0.9, 1.0]}, "optimizer.betas.1: 1.0: input should be less than 1"),
    ],
)
def test_mistakes_are_told_in_one_message_with_key_and_value(changes, words):
    assert words in message(**changes)


def test_a_missing_section_is_named():
    with pytest.raises(ConfigError, match="data: missing"):
        build_config({"model": {}, "run": {"directory": "x"}})


@pytest.mark.parametrize("refusal", UNSUPPORTED, ids=lambda refusal: refusal.combination)
def test_refused_combinations_are_refused_and_their_suggestions_work(refusal):
    refused = settings()
    words = refusal.combination.replace(" with ", " ").split()
    for key, value in zip(words[::2], words[1::2], strict=True):
        section, name = key.split(".")
        refused.setdefault(section, {})[name] = yaml.safe_load(value)
    with pytest.raises(ConfigError) as caught:
        build_config(refused)
    assert refusal.reason in str(caught.value)
    for change in refusal.instead:
        key, _, value = change.partition("=")
        section, name = key.split(".")
        mended = {part: dict(keys) for part, keys in refused.items()}
        mended[section][name] = yaml.safe_load(value)
        assert isinstance(build_config(mended), Config)


def test_the_readme_shows_what_is_refused():
    readme = (REPOSITORY / "README.md").read_text()
    for refusal in UNSUPPORTED:
        assert refusal.combination in readme


def test_overrides_are_yaml_and_their_mistakes_are_named(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(settings()))
    config = load_config(path, ["train.steps=7", "optimizer.learning_rate=3e-4", "data.sequence_length=1K"])
    assert (config.train.steps, config.optimizer.learning_rate, config.data.sequence_length) == (7, 3e-4, 1024)
    for override in ("train.steps", "steps=3", "a.b.c=1"):
        with pytest.raises(ConfigError, match=r"not of the form section.key=value"):
            load_config(path, [override])
    with pytest.raises(ConfigError, match='did you mean "steps"'):
        load_config(path, ["train.stepz=3"])


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "there.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match=r"missing.yaml: no such file; .* has there.yaml"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="holds list"):
        load_config(tmp_path / "there.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "twice.yaml").write_text("train:\n  steps: 1\n  steps: 2\n")
    with pytest.raises(ConfigError, match='"steps" stands twice'):
        load_config(tmp_path / "twice.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize(("world_size", "size", "replicas"), [(1, 1, 1), (4, 2, 2), (6, 3, 2)])
def test_processes_divide_into_replicas(world_size, size, replicas):
    assert check_world_size(build_config(settings(context__size=size)), world_size) == replicas


@pytest.mark.parametrize(("world_size", "size"), [(3, 2), (2, 4), (7, 6)])
def test_a_wrong_number_of_processes_names_numbers_that_work(world_size, size):
    with pytest.raises(ConfigError) as caught:
        check_world_size(build_config(settings(context__size=size)), world_size)
    text = str(caught.value)
    counts = text.split("processes; ")[1].split(" processes, or")[0].split(" or ")
    for count in counts:
        check_world_size(build_config(settings(context__size=size)), int(count))
    smaller = int(text.split("context.size=")[1].split(",")[0])
    check_world_size(build_config(settings(context__size=smaller)), world_size)
