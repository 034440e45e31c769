"""Settings that layers have of their own, and messages about heads, each of whose suggestions is tried."""

import re
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from pydantic import ValidationError

from hydra_dist.config import ModelConfig
from hydra_dist.config.file import build_config, dump_config, load_config
from hydra_dist.errors import ConfigError

BASE = {"num_layers": 6, "hidden_size": 256, "head_dim": 32, "compression_factor": 4}
REST = {"data": {"directory": "data/x", "sequence_length": 64}, "run": {"directory": "runs/x"}}


def model(*entries: dict[str, Any], **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({**BASE, **changes, "layer_settings": list(entries)})


def message(*entries: Any, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build_config({"model": {**BASE, **changes, "layer_settings": list(entries)}, **REST})
    return str(caught.value).removeprefix("configuration: ")


def heads(config: ModelConfig) -> list[tuple[int, int]]:
    return [(layer.num_query_heads, layer.num_key_heads) for layer in config.layers]


def test_two_times_in_the_first_layers_and_four_times_in_the_later_ones():
    config = model({"layers": [0, 1, 2], "compression_factor": 2})
    assert heads(config) == [(4, 4)] * 3 + [(2, 2)] * 3
    assert [(layer.query_size, layer.head_dim, layer.num_layers) for layer in config.layers] == [
        (128, 32, 1),
        (128, 32, 1),
        (128, 32, 1),
        (64, 32, 1),
        (64, 32, 1),
        (64, 32, 1),
    ]
    assert (config.num_query_heads, config.num_key_heads) == (2, 2)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"query_compression": 2}, (4, 2)),
        ({"key_compression": 8}, (2, 1)),
        ({"num_query_heads": 6}, (6, 2)),
        ({"num_key_heads": 1}, (2, 1)),
        ({"compression_factor": 2, "num_key_heads": 1}, (4, 1)),
        ({"compression_factor": 8, "query_compression": 1}, (8, 1)),
        ({"use_convs": False}, (2, 2)),
    ],
)
@pytest.mark.parametrize("given", [{}, {"compression_factor": None, "num_query_heads": 2, "num_key_heads": 2}])
def test_what_a_layer_says_of_heads_replaces_what_the_model_says(given, own, expected):
    assert heads(model({"layers": [3], **own}, **given)) == [(2, 2)] * 3 + [expected] + [(2, 2)] * 2


def test_every_setting_reaches_its_layers_and_no_others():
    own = {
        "attention": "gqa",
        "conv_kernel_sizes": [4, 3],
        "use_convs": False,
        "use_qk_mean": False,
        "use_qk_norm": False,
        "temperature": "raw",
        "use_value_shift": False,
        "use_output_norm": True,
        "window": 9,
        "num_query_heads": 8,
        "num_key_heads": 4,
    }
    heads_too = {"compression_factor", "query_compression", "key_compression"}
    assert (
        own.keys() | heads_too | {"layers"}
        == type(model({"layers": 0, "window": 1}).layer_settings[0]).model_fields.keys()
    )
    config = model({"layers": [1, 4], **own})
    plain = model().layers[0]
    for index, layer in enumerate(config.layers):
        for key, value in own.items():
            expected = value if index in (1, 4) else getattr(plain, key)
            assert getattr(layer, key) == (tuple(expected) if isinstance(expected, list) else expected), key
            assert value != getattr(plain, key)
        assert (layer.rope_dim, layer.mlp_size, layer.layer_settings) == (plain.rope_dim, plain.mlp_size, ())


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ([0, 5], [0, 5]),
        (3, [3]),
        ("3", [3]),
        ("0-2", [0, 1, 2]),
        ("3-", [3, 4, 5]),
        ("5-", [5]),
        (["0-1", 4], [0, 1, 4]),
        ([" 2 - 3 ", "5-5"], [2, 3, 5]),
    ],
)
def test_ranges_of_layers(spec, layers):
    config = model({"layers": spec, "window": 7})
    assert [index for index, window in enumerate(config.windows) if window == 7] == layers
    assert config.layer_settings[0].layers == tuple(layers)


def test_windows_of_layers_come_before_the_list_and_the_list_before_the_window():
    entries = ({"layers": [1], "window": None}, {"layers": [2], "window": 3}, {"layers": [4], "use_convs": False})
    assert model(*entries, window=8).windows == (8, None, 3, 8, 8, 8)
    assert model(*entries, window=8, layer_windows=[16, 32]).windows == (16, None, 3, 32, 16, 32)


def test_induction_is_asked_of_the_layer_itself():
    entry = {"layers": "0-4", "conv_kernel_sizes": [1, 2]}
    config = model(entry, induction_layers=[5])
    assert [layer.induction_layers for layer in config.layers] == [()] * 5 + [(0,)]
    text = message(entry, induction_layers=[4])
    assert "model.induction_layers has 4, and such a layer needs" in text
    assert text.endswith("model.induction_layers=[5] works")
    assert message({"layers": "0-", "attention": "gqa"}, induction_layers=[0]).endswith("induction_layers=[] works")


def test_a_layer_counts_for_itself():
    """What a layer comes to has no layers of its own to look up, and loads like any other model."""
    config = model({"layers": [0], "compression_factor": 2, "use_output_norm": True}, induction_layers=[0])
    layer = config.layers[0]
    assert layer.layers == (layer,)
    assert ModelConfig.model_validate(layer.model_dump(mode="json")) == layer


ENTRIES = (
    {"layers": "0-1", "compression_factor": 2, "window": 16},
    {"layers": [2], "window": None, "temperature": "exp_clamp"},
    {"layers": ["4-"], "attention": "gqa", "num_key_heads": 1, "conv_kernel_sizes": [1, 3]},
)


def test_what_is_written_with_a_run_loads_to_the_same(tmp_path):
    config = build_config({"model": {**BASE, "window": 4, "layer_settings": list(ENTRIES)}, **REST})
    written = tmp_path / "resolved.yaml"
    written.write_text(dump_config(config))
    again = load_config(written)
    assert again == config
    assert again.model.layers == config.model.layers
    assert again.model.windows == (16, 16, None, 4, 4, 4), "a window of null is one"
    assert dump_config(again) == dump_config(config)
    assert ModelConfig.model_validate(config.model.model_dump()).layers == config.model.layers


def test_on_the_command_line(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({"model": BASE, **REST}))
    written = "model.layer_settings=[{layers: 0-2, compression_factor: 2}, {layers: [5], window: 64, use_convs: no}]"
    config = load_config(path, [written.replace("no}", "false}")]).model
    assert heads(config) == [(4, 4)] * 3 + [(2, 2)] * 3
    assert (config.layers[5].window, config.layers[5].use_convs) == (64, False)


@pytest.mark.parametrize(
    ("entries", "words", "mended"),
    [
        (
            [{"layers": [1, 6], "window": 3}],
            "model.layer_settings.0.layers has 6, and the last of 6 layers is 5; "
            "model.layer_settings.0.layers=[1] works",
            [{"layers": [1], "window": 3}],
        ),
        (
            [{"layers": [-1], "window": 3}, {"layers": "2-4", "window": 4}],
            "model.layer_settings.0.layers has -1, and the last of 6 layers is 5; "
            "model.layer_settings.0.layers=[0-1, 5] works",
            [{"layers": ["0-1", 5], "window": 3}, {"layers": "2-4", "window": 4}],
        ),
        (
            [{"layers": "4-9", "window": 3}],
            "model.layer_settings.0.layers has 6, and the last of 6 layers is 5; "
            "model.layer_settings.0.layers=[4-5] works",
            [{"layers": "4-5", "window": 3}],
        ),
        (
            [{"layers": "0-3", "window": 3}, {"layers": [3, 4], "use_convs": False}],
            "model.layer_settings.0.layers has 3, which model.layer_settings.1 has as well; "
            "model.layer_settings.0.layers=[0-2] works",
            [{"layers": "0-2", "window": 3}, {"layers": [3, 4], "use_convs": False}],
        ),
        (
            [{"layers": [2, 2], "window": 3}],
            "model.layer_settings.0.layers has 2 twice; model.layer_settings.0.layers=[2] works",
            [{"layers": [2], "window": 3}],
        ),
        (
            [{"layers": "0-", "window": 3}, {"layers": "0-", "window": 4}],
            "model.layer_settings.0.layers has 0, which model.layer_settings.1 has as well; "
            "the configuration without this entry works",
            [{"layers": "0-", "window": 4}],
        ),
        (
            [{"layers": "3-1", "window": 3}],
            "model.layer_settings.0.layers: '3-1' is no layer and no range of layers; a number such as 0 or a range "
            "such as 0-5 is read",
            [{"layers": ["0-5"], "window": 3}],
        ),
        (
            [{"layers": [0]}],
            "model.layer_settings.0: sets nothing; a key beside layers, such as compression_factor, or no such entry, "
            "works",
            [],
        ),
        (
            [{"layers": [0], "compression_factor": 3}],
            "model.layer_settings.0.compression_factor 3 leaves hidden_size 256 / (3 x head_dim 32) heads, which is no "
            "integer; 1 or 2 or 4 or 8 work",
            [{"layers": [0], "compression_factor": 8}],
        ),
        (
            [{"layers": [0], "num_key_heads": 3, "num_query_heads": 8}],
            "model.layer_settings.0.num_query_heads 8 is not a multiple of model.layer_settings.0.num_key_heads 3; "
            "6 or 9 query heads, or 2 key heads, work",
            [{"layers": [0], "num_key_heads": 3, "num_query_heads": 9}],
        ),
        (
            [{"layers": [0], "key_compression": 2}],
            "model.layer_settings.0.num_query_heads 2 is not a multiple of model.layer_settings.0.num_key_heads 4 "
            "(from key_compression 2); 4 query heads, or 2 key heads, work",
            [{"layers": [0], "key_compression": 2, "num_query_heads": 4}],
        ),
    ],
)
def test_mistakes_in_entries_name_what_works(entries, words, mended):
    assert message(*entries) == words
    model(*mended)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"layers": [0], "windw": 3}, 'model.layer_settings.0.windw: unknown key (did you mean "window"?)'),
        ({"layers": [0], "zzz": 3}, "model.layer_settings.0.zzz: unknown key; an entry has attention, "),
        (
            {"layers": [0], "head_dim": 64},
            "model.layer_settings.0.head_dim: is the same in all layers; it belongs in model:",
        ),
        ({"window": 3}, "model.layer_settings.0.layers: missing"),
        ({"layers": [], "window": 3}, "model.layer_settings.0.layers: []"),
        ({"layers": [0.5], "window": 3}, "model.layer_settings.0.layers.0: 0.5: input should be a valid integer"),
        ({"layers": [True], "window": 3}, "model.layer_settings.0.layers.0: True: input should be a valid integer"),
        ({"layers": [0], "window": 0}, "model.layer_settings.0.window: 0: input should be greater than 0"),
        ({"layers": [0], "use_convs": None}, "model.layer_settings.0.use_convs: None: input should be a valid boolean"),
        (3, "model.layer_settings.0: 3 is not a section of keys and values"),
    ],
)
def test_entries_of_another_form_are_named(entry, words):
    assert words in message(entry)


@pytest.mark.parametrize("key", ["hidden_size", "head_dim", "num_layers", "num_key_heads", "compression_factor"])
@pytest.mark.parametrize("value", ["8", 0, -1, 2.0, True, 2**40])
def test_a_number_that_is_none_is_the_only_thing_told(key, value):
    text = message({"layers": "1-", "window": 4}, **{key: value})
    assert text.startswith(f"model.{key}: {value!r}: input should be ")
    assert "\n" not in text


# --- every suggestion is tried ---

HEAD_SETTINGS = {
    "num_query_heads": st.integers(1, 12),
    "num_key_heads": st.integers(1, 12),
    "compression_factor": st.integers(1, 9),
    "query_compression": st.integers(1, 9),
    "key_compression": st.integers(1, 9),
}


def suggestions(text: str) -> list[dict[str, Any]]:
    """The changes that a message offers, as ``section.key`` -> value."""
    if found := re.fullmatch(r"(\S+) \d+.* no integer; ([\d or]+) works?", text):
        return [{found[1]: int(value)} for value in found[2].split(" or ")]
    if found := re.search(r"; ([^;]*=[^;]*) works$", text):
        return [dict(_pair(pair) for pair in found[1].split(" with "))]
    where = text.split(".num_query_heads")[0]
    offers = re.findall(r"((?:\d+ or )*\d+) (query|key) heads", text.rpartition("; ")[2])
    return [{f"{where}.num_{kind}_heads": int(value)} for values, kind in offers for value in values.split(" or ")]


def _pair(text: str) -> tuple[str, Any]:
    key, value = text.split("=")
    return key, yaml.safe_load(value)


def changed(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    settings = {**settings, "layer_settings": [dict(entry) for entry in settings["layer_settings"]]}
    for path, value in changes.items():
        section, key = path.rsplit(".", 1)
        index = section.removeprefix("model").removeprefix(".layer_settings.")
        (settings["layer_settings"][int(index)] if index else settings)[key] = value
    return settings


def problem(settings: dict[str, Any]) -> str | None:
    try:
        config = ModelConfig.model_validate(settings)
    except ValidationError as error:
        (only,) = error.errors()
        return only["msg"].removeprefix("Value error, ")
    for layer in (config, *config.layers):
        assert layer.num_query_heads % layer.num_key_heads == 0 < layer.num_key_heads
        assert layer.head_dim % 2 == 0
    return None


@profile(max_examples=500, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 12),
    st.fixed_dictionaries({}, optional=HEAD_SETTINGS),
    st.lists(st.fixed_dictionaries({}, optional=HEAD_SETTINGS).filter(bool), max_size=2),
)
def test_every_suggestion_about_heads_works(hidden_size, head_dim, own, layers):
    entries = [{"layers": [index], **entry} for index, entry in enumerate(layers)]
    settings = {"num_layers": 2, "hidden_size": hidden_size, "head_dim": head_dim, **own, "layer_settings": entries}
    for _ in range(4):  # the model's mistake is told first, then that of each entry
        text = problem(settings)
        if text is None:
            return
        offers = suggestions(text)
        assert offers, f"{text}: offers nothing"
        for offer in offers:
            after = problem(changed(settings, offer))
            section = next(iter(offer)).rsplit(".", 1)[0]
            assert after is None or (section != "model" and not after.startswith(section)), (text, offer, after)
        settings = changed(settings, offers[0])
    raise AssertionError(f"{settings}: mended three times and still refused")


def test_the_check_above_rejects_a_suggestion_that_does_not_work():
    settings = {"num_layers": 1, "hidden_size": 96, "head_dim": 16, "compression_factor": 4, "layer_settings": []}
    text = problem(settings)
    assert suggestions(text) == [{"model.compression_factor": factor} for factor in (1, 2, 3, 6)]
    assert problem(changed(settings, {"model.compression_factor": 5})) is not None
