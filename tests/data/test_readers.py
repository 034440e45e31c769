import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hydra_dist.data.documents import SourceFile
from hydra_dist.data.readers import Skips, read_documents
from hydra_dist.errors import RunError


def source(path, kind):
    return SourceFile(path, path.name, kind, path.stat().st_size)


def read(path, kind, field="text", skip=False):
    skips = Skips(skip)
    return [(d.name, d.text) for d in read_documents([source(path, kind)], field, skips)], skips


def error(path, kind, field="text"):
    with pytest.raises(RunError) as caught:
        read(path, kind, field)
    return str(caught.value)


def write(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def test_text_keeps_its_line_ends_and_loses_its_byte_order_mark(tmp_path):
    path = write(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\ntwo\n\xc3\xa9")
    (document,) = read_documents([source(path, "text")], "text", Skips(False))
    assert (document.name, document.text, document.text_bytes) == ("a.txt", "one\r\ntwo\né", 11)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_undecodable_text_names_its_byte_or_is_listed(tmp_path, mark):
    path = write(tmp_path, "a.txt", mark + b"good \xff bad")
    place = len(mark) + 5
    message = error(path, "text")
    assert f"{path}: not UTF-8 at byte {place}" in message
    assert "--skip-undecodable" in message
    documents, skips = read(path, "text", skip=True)
    assert documents == []
    assert skips.undecodable == [f"a.txt: not UTF-8 at byte {place} (invalid start byte)"]


def test_empty_texts_are_counted(tmp_path):
    documents, skips = read(write(tmp_path, "a.txt", b"\xef\xbb\xbf"), "text")
    assert (documents, skips.empty) == ([], 1)


def test_python_declares_its_encoding(tmp_path):
    path = write(tmp_path, "a.py", b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    assert read(path, "python")[0] == [("a.py", "# -*- coding: latin-1 -*-\nx = 'é'\n")]
    assert "not UTF-8 at byte" in error(path, "text")


@pytest.mark.parametrize(
    "data",
    [
        b"# coding: uft-8\n",
        b"x = '\xff'\n",
        b"\xef\xbb\xbf# coding: latin-1\n",
        b"# coding: hex\nzz",
        b"# coding: ascii\n\n\n\xe9",
    ],
)
def test_undecodable_python_is_an_error_but_not_in_the_built_in_corpus(tmp_path, data):
    path = write(tmp_path, "bad.py", data)
    assert str(path) in error(path, "python")
    documents, skips = read(path, "stdlib")
    assert documents == []
    assert len(skips.undecodable) == 1


def lines(tmp_path, *rows):
    return write(tmp_path, "a.jsonl", b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows))


def test_jsonl_rows_are_named_by_their_line(tmp_path):
    path = lines(tmp_path, b'\xef\xbb\xbf{"text": "one"}', b"", {"text": "two\n"}, {"text": ""}, {"text": "é"})
    documents, skips = read(path, "jsonl")
    assert documents == [("a.jsonl:1", "one"), ("a.jsonl:3", "two\n"), ("a.jsonl:5", "é")]
    assert skips.empty == 1
    assert read(lines(tmp_path, {"body": "b", "text": 1}), "jsonl", "body")[0] == [("a.jsonl:1", "b")]


GOOD = {"text": "good"}


@pytest.mark.parametrize(
    "row, message",
    [
        (b'{"text": "\xff"}', "line 2: not UTF-8 at byte 27 of the file"),
        (b'{"text": "a', "line 2: not JSON (Unterminated string"),
        (b"[" * 100000, "line 2: not JSON"),
        (b'{"text": "", "n": ' + b"9" * 5000 + b"}", "line 2: not JSON"),
        (b'{"text": "\\ud800"}', "line 2: field 'text' holds half a surrogate pair"),
    ],
)
def test_undecodable_lines_are_named_or_skipped(tmp_path, row, message):
    path = lines(tmp_path, GOOD, row, GOOD)
    assert message in error(path, "jsonl")
    documents, skips = read(path, "jsonl", skip=True)
    assert [name for name, _ in documents] == ["a.jsonl:1", "a.jsonl:3"]
    assert len(skips.undecodable) == 1
    assert message in skips.undecodable[0]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"texts": "a", "id": 3}, "line 2: no field 'text' (did you mean \"texts\"?); its fields are 'texts', 'id'"),
        ({}, "its fields are none"),
        ({"text": 5}, "line 2: field 'text' is a number, not a text"),
        ({"text": None}, "field 'text' is null"),
        ({"text": ["a"]}, "field 'text' is a list"),
        (["text"], "a JSON object with the field 'text' is expected, not a list"),
    ],
)
def test_lines_without_the_text_stop_the_reading_even_where_undecodable_ones_are_skipped(tmp_path, row, message):
    path = lines(tmp_path, GOOD, row)
    assert message in error(path, "jsonl")
    with pytest.raises(RunError):
        read(path, "jsonl", skip=True)


def parquet(tmp_path, **columns):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_streams_every_row_group(tmp_path, kind):
    values = ["one", "é\n", None, "", "five"]
    documents, skips = read(parquet(tmp_path, id=list(range(5)), text=pa.array(values).cast(kind)), "parquet")
    assert documents == [("a.parquet:0", "one"), ("a.parquet:1", "é\n"), ("a.parquet:4", "five")]
    assert skips.empty == 2


def test_parquet_problems(tmp_path):
    path = parquet(tmp_path, body=["a"], id=[1])
    assert "no column 'text'; its columns are 'body', 'id'; choose with --field" in error(path, "parquet")
    assert "column 'id' is int64, not text" in error(path, "parquet", "id")
    bad = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff"))
    path = parquet(tmp_path, text=bad)
    assert "row 1: not UTF-8 at byte 0" in error(path, "parquet")
    documents, skips = read(path, "parquet", skip=True)
    assert documents == [("a.parquet:0", "a")]
    assert len(skips.undecodable) == 1
    assert "not a Parquet file" in error(write(tmp_path, "b.parquet", b"PAR1 text"), "parquet")
    whole = parquet(tmp_path, text=["x" * 50] * 9).read_bytes()
    assert "truncated" in error(write(tmp_path, "c.parquet", whole[:-20]), "parquet")
    table = pa.table({"text": [f"{number * 7919 % 10007:x}" * 9 for number in range(3000)]})
    pq.write_table(table, tmp_path / "e.parquet", compression="zstd", use_dictionary=False)
    broken = bytearray((tmp_path / "e.parquet").read_bytes())
    broken[len(broken) // 2 : len(broken) // 2 + 64] = bytes(64)
    assert "damaged" in error(write(tmp_path, "d.parquet", broken), "parquet")


def test_a_file_that_went_away(tmp_path):
    path = write(tmp_path, "a.txt", b"x")
    file = source(path, "text")
    path.unlink()
    with pytest.raises(RunError, match="cannot be read"):
        list(read_documents([file], "text", Skips(True)))
