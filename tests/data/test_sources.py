import os
from pathlib import Path

import pytest

from hydra_dist.data.sources import find_inputs
from hydra_dist.errors import ConfigError


def names(inputs, **settings):
    return [(file.name, file.kind) for file in find_inputs(inputs, **settings).files]


def test_a_directory_is_walked_in_sorted_order_and_only_text_is_taken(tmp_path):
    root = tmp_path / "src"
    for name, content in {
        "b.py": b"x = 1",
        "a/z.txt": b"z",
        "a/rows.jsonl": b"{}",
        "a/table.parquet": b"PAR1",
        "a-b/y.txt": b"y",
        "LICENSE": "© text".encode(),
        "cut": b"a" * 8191 + "é".encode(),
        "image.png": b"\x89PNG\0\0",
        "latin": b"caf\xe9 au lait",
        "latin.txt": b"caf\xe9",
        ".git/config": b"hidden",
        ".hidden": b"hidden",
        "__pycache__/c.py": b"cache",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    os.symlink(root, root / "a" / "loop")
    os.symlink("nowhere", root / "broken.txt")
    found = find_inputs([root])
    assert [(file.name, file.kind) for file in found.files] == [
        ("src/LICENSE", "text"),
        ("src/a-b/y.txt", "text"),
        ("src/a/rows.jsonl", "jsonl"),
        ("src/a/table.parquet", "parquet"),
        ("src/a/z.txt", "text"),
        ("src/b.py", "python"),
        ("src/cut", "text"),
        ("src/latin.txt", "text"),
    ]
    assert found.left_out == 2  # image.png by its NUL bytes, latin by its encoding
    assert found.names == ["src"]


def test_names_do_not_depend_on_how_the_path_is_written(tmp_path, tree, monkeypatch):
    root = tree(3)
    expected = names([root])
    monkeypatch.chdir(root)
    assert names(["."]) == names([f"{root}/../{root.name}/"]) == expected


def test_a_file_reached_twice_is_read_once(tree):
    root = tree(6)
    assert len(names([root, root / "part0" / "000.txt", str(root)])) == 6


def test_stdlib_is_the_corpus_and_a_path_of_that_name_needs_a_dot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("stdlib").mkdir()
    Path("stdlib/mine.txt").write_text("x")
    assert len(names(["stdlib"])) > 500
    assert names(["./stdlib"]) == [("stdlib/mine.txt", "text")]


def refused(*inputs, output=None):
    with pytest.raises(ConfigError) as caught:
        find_inputs(inputs, output)
    return str(caught.value)


def test_readable_refusals(tmp_path, tree):
    root = tree(2)
    assert "no --input" in refused()
    assert 'did you mean "corpus"?' in refused(tmp_path / "corpsu")
    assert "stdlib is the built-in corpus" in refused(tmp_path / "none" / "x.txt")
    (tmp_path / "empty").mkdir()
    assert "no text, JSONL or Parquet file" in refused(tmp_path / "empty")
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    assert "NUL bytes" in refused(tmp_path / "binary.txt")
    os.mkfifo(tmp_path / "pipe")
    assert "cannot be read twice" in refused(tmp_path / "pipe")
    assert "lies within --input" in refused(root, output=root / "prepared")
    assert find_inputs([root], tmp_path / "corpus-prepared").files
