import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors

from hydra_dist.data import tokenizer as module
from hydra_dist.data.tokenizer import (
    BEGIN,
    END,
    byte_tokenizer,
    load_tokenizer,
    parse_spec,
    tokenizer_from_json,
    train_tokenizer,
)
from hydra_dist.errors import ConfigError

TEXTS = ["def f(x):\n    return x\n" * 20, "héllo wörld, 日本語 \U0001f680\r\n\t x", "the ring of the rings " * 30]
BYTES = byte_tokenizer()
TRAINED = train_tokenizer(TEXTS, 300)
TRICKY = [
    "",
    " ",
    "  a",
    "a  ",
    "\x00\x01\x7f",
    "\ufeffx",
    "\r\n\n\r",
    f"{BEGIN}{END}a{END}",
    "e\u0301",
    "\U0010ffff",
    "\x85",
]


@pytest.mark.parametrize("tokenizer", [BYTES, TRAINED], ids=["byte", "trained"])
@pytest.mark.parametrize("text", TRICKY)
def test_round_trip_of_difficult_texts(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert not {tokenizer.begin_id, tokenizer.end_id} & set(ids.tolist())


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip_of_any_text(text):
    for tokenizer in (BYTES, TRAINED):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_round_trip_rejects_special_tokens_read_from_text():
    forged = byte_tokenizer()
    forged.pipeline.encode_special_tokens = False
    assert forged.decode(forged.encode(f"a{END}b")) != f"a{END}b"


def test_byte_ids_are_the_bytes():
    text = "\x00a é\n\U0001f680"
    assert BYTES.encode(text).tolist() == list(text.encode())
    assert (BYTES.vocab_size, BYTES.begin_id, BYTES.end_id) == (258, 256, 257)
    assert BYTES.is_byte_level
    assert BYTES.notes == []
    assert BYTES.token_bytes.tolist() == [1] * 256 + [0, 0]


def test_special_tokens_have_no_text():
    assert TRAINED.decode([TRAINED.begin_id, *TRAINED.encode("ab"), TRAINED.end_id]) == "ab"
    assert TRAINED.token_bytes[[TRAINED.begin_id, TRAINED.end_id]].tolist() == [0, 0]


def test_training_gives_the_asked_size_and_shorter_sequences():
    assert TRAINED.vocab_size == 300
    assert not TRAINED.notes
    assert len(TRAINED.encode(TEXTS[0])) < len(BYTES.encode(TEXTS[0])) / 2
    smallest = train_tokenizer(TEXTS, 258)
    assert smallest.vocab_size == 258
    assert smallest.decode(smallest.encode(TEXTS[1])) == TEXTS[1]


def test_a_corpus_without_more_pairs_is_noted():
    tokenizer = train_tokenizer(["abc"], 1000)
    assert tokenizer.vocab_size < 300
    assert tokenizer.notes == [
        f"the corpus has no more pairs to merge: {tokenizer.vocab_size} vocabulary entries instead of 1000"
    ]


def test_training_is_the_same_in_another_process():
    code = f"from hydra_dist.data.tokenizer import train_tokenizer as t; print(t({TEXTS!r}, 300).to_json())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.decode()
    assert out.strip() == TRAINED.to_json()
    assert train_tokenizer(TEXTS[:2], 300).to_json() != TRAINED.to_json()


def test_long_texts_are_cut_at_lines_and_come_back_whole(monkeypatch):
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 10)
    for text in ("ab\ncd\n" * 9, "x" * 35, "\n" * 21, "é" * 10, ""):
        pieces = list(module._pieces(text))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 10
        assert BYTES.decode(BYTES.encode(text)) == text
    assert list(module._pieces("abc\ndefghijk")) == ["abc\n", "defghijk"]


def spec_error(spec):
    with pytest.raises(ConfigError) as caught:
        parse_spec(spec)
    return str(caught.value)


def test_specifications(tmp_path):
    assert parse_spec("byte").kind == "byte"
    assert parse_spec("train:8192").size == 8192
    assert parse_spec("train:258").size == 258
    (tmp_path / "odd.name").write_text("{}")
    assert parse_spec(str(tmp_path / "odd.name")).kind == "file"
    assert 'did you mean "byte"?' in spec_error("bytes")
    assert 'did you mean "train:8192"?' in spec_error("train8192")
    assert "at least 258 entries; train:8192 works" in spec_error("train:257")
    assert "'many' is not a number" in spec_error("train:many")
    assert "'-5' is not a number" in spec_error("train:-5")
    assert "does not exist" in spec_error(str(tmp_path / "none.json"))
    assert "is not a file" in spec_error(str(tmp_path))


def word_level():
    pipeline = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    pipeline.pre_tokenizer = pre_tokenizers.Whitespace()
    return pipeline


def test_a_file_without_the_special_tokens_grows(tmp_path):
    path = tmp_path / "words.json"
    word_level().save(str(path))
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == 5
    assert {tokenizer.begin_id, tokenizer.end_id} == {3, 4}
    assert tokenizer.notes == [f"{BEGIN} is not in {path}: added as id 3", f"{END} is not in {path}: added as id 4"]
    assert load_again(tokenizer).notes == []
    assert load_again(tokenizer).vocab_size == 5


def load_again(tokenizer):
    return tokenizer_from_json(tokenizer.to_json(), "again")


def test_holes_in_the_ids_count_for_the_embedding():
    pipeline = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 70000}, unk_token="a"))
    assert module.Tokenizer(pipeline).vocab_size > 70000


@pytest.mark.parametrize("content", [b"", b"{}", b"[1", b'{"model": 1}', b"\xff\xfe", b"weights"])
def test_files_that_are_no_tokenizer(tmp_path, content):
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"t\.json: not a tokenizers JSON file"):
        load_tokenizer(path)


def test_a_missing_file_and_random_encodings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_tokenizer(tmp_path / "t.json")
    state = json.loads(TRAINED.to_json())
    state["model"]["dropout"] = 0.1
    with pytest.raises(ConfigError, match=r"dropout 0\.1"):
        tokenizer_from_json(json.dumps(state), "t.json")


def test_padding_truncation_and_templates_of_a_file_do_not_touch_the_corpus():
    pipeline = tokenizers.Tokenizer.from_str(TRAINED.to_json())
    pipeline.enable_truncation(4)
    pipeline.enable_padding(length=50)
    pipeline.post_processor = processors.TemplateProcessing(f"{BEGIN} $A", special_tokens=[(BEGIN, TRAINED.begin_id)])
    tokenizer = module.Tokenizer(pipeline)
    np.testing.assert_array_equal(tokenizer.encode(TEXTS[1]), TRAINED.encode(TEXTS[1]))


def variants():
    """Pipelines that lose or add characters, or hide which bytes a token stands for."""
    prefix = tokenizers.Tokenizer.from_str(TRAINED.to_json())
    prefix.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    lower = tokenizers.Tokenizer.from_str(TRAINED.to_json())
    lower.normalizer = normalizers.Lowercase()
    nfc = tokenizers.Tokenizer.from_str(TRAINED.to_json())
    nfc.normalizer = normalizers.NFC()
    removed = tokenizers.Tokenizer.from_str(TRAINED.to_json())
    removed.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return {"words": word_level(), "prefix": prefix, "lower": lower, "nfc": nfc, "removed": removed}


@pytest.mark.parametrize("name", ["words", "prefix", "lower", "nfc", "removed"])
def test_bytes_of_tokens_add_up_whatever_the_pipeline_does(name):
    tokenizer = module.Tokenizer(variants()[name])
    assert not tokenizer.is_byte_level
    with pytest.raises(ValueError, match="byte-level"):
        _ = tokenizer.token_bytes
    texts = [*TEXTS, *TRICKY, "a b  c", "  a b  ", "E\u0301É e\u0301"]
    for text, (ids, counts) in zip(texts, tokenizer.encode_batch_with_bytes(texts), strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
        assert (counts >= 0).all()
        assert not len(ids) or counts.sum() == len(text.encode())


def test_bytes_by_place_agree_with_bytes_by_vocabulary_where_characters_are_whole():
    text = TEXTS[0] + TEXTS[2]
    ((ids, counts),) = TRAINED.encode_batch_with_bytes([text])
    np.testing.assert_array_equal(counts, TRAINED.token_bytes[ids])
    # and the vocabulary alone would be wrong for a pipeline that drops characters
    lossy = module.Tokenizer(variants()["removed"])
    assert TRAINED.token_bytes[lossy.encode(text)].sum() != len(text.encode())


def test_pieces_keep_the_byte_counts(monkeypatch):
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 7)
    tokenizer = module.Tokenizer(variants()["words"])
    text = "a b é 日本 " * 10
    ((ids, counts),) = tokenizer.encode_batch_with_bytes([text])
    assert len(ids) == len(counts)
    assert counts.sum() == len(text.encode())


def test_common_pipelines_are_recognised_as_byte_level():
    llama = tokenizers.Tokenizer.from_str(TRAINED.to_json())
    llama.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r"\s+|\w+|[^\w\s]+"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    llama.add_tokens(["<tool>"])
    tokenizer = module.Tokenizer(llama)
    assert tokenizer.is_byte_level
    for text in (*TEXTS, *TRICKY, "x<tool>y 123"):
        ids = tokenizer.encode(text)
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert tokenizer.decode(ids) == text
