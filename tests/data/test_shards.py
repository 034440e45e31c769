import itertools
import json
import shutil

import numpy as np
import pytest

from hydra_dist.data import Dataset, check_vocabulary, prepare
from hydra_dist.data.files import npy_bytes
from hydra_dist.errors import ConfigError, RunError


@pytest.fixture(scope="module")
def original(write_tree, tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    write_tree(root / "corpus", 60)
    return prepare([root / "corpus"], root / "data", "train:300", shard_tokens=500, eval_fraction=0.2).directory


@pytest.fixture
def prepared(original, tmp_path):
    """A copy of its own for each test to damage."""
    return shutil.copytree(original, tmp_path / "data")


def plain(directory, split):
    """The split read without the code under test: ids, and the start of each token's document."""
    manifest = json.loads((directory / "manifest.json").read_text())
    ids, starts = [], []
    for shard in manifest["splits"][split]:
        data = np.fromfile(directory / shard["data"]["name"], dtype=manifest["dtype"])
        index = np.load(directory / shard["index"]["name"])
        base = len(ids)
        for a, b in itertools.pairwise(index):
            starts += [base + int(a)] * int(b - a)
        ids += data.tolist()
    return ids, starts


@pytest.mark.parametrize("split", ["train", "eval"])
def test_any_range_equals_the_whole(prepared, split):
    dataset = Dataset(prepared, split, verify=True)
    ids, starts = plain(prepared, split)
    assert (dataset.num_tokens, dataset.num_documents) == (len(ids), len(set(starts)))
    assert len(dataset.manifest.shards(split)) > 1
    lengths = dataset.tokenizer.token_bytes
    rng = np.random.default_rng(0)
    ranges = [(0, len(ids)), (0, 0), (len(ids), len(ids)), (len(ids) - 1, len(ids))]
    ranges += [tuple(sorted(rng.integers(0, len(ids) + 1, 2))) for _ in range(200)]
    for a, b in ranges:
        assert dataset.tokens(a, b).tolist() == ids[a:b]
        assert dataset.document_starts(a, b).tolist() == starts[a:b]
        assert dataset.text_bytes_of(a, b).tolist() == lengths[ids[a:b]].tolist()
    assert dataset.text_bytes_of(0, len(ids)).sum() == dataset.text_bytes > 0


def test_every_document_is_there_once_with_its_text(prepared, tree):
    texts = []
    for split in ("train", "eval"):
        dataset = Dataset(prepared, split)
        ids, starts = plain(prepared, split)
        for start in sorted(set(starts)):
            document = [i for i, s in zip(ids, starts, strict=True) if s == start]
            assert (document[0], document[-1]) == (dataset.begin_id, dataset.end_id)
            assert not {dataset.begin_id, dataset.end_id} & set(document[1:-1])
            texts.append(dataset.tokenizer.decode(document))
    assert sorted(texts) == sorted(path.read_bytes().decode() for path in tree(60).rglob("*.txt"))


def test_ranges_outside_the_split_are_a_bug(prepared):
    dataset = Dataset(prepared)
    for a, b in [(-1, 2), (3, 2), (0, dataset.num_tokens + 1)]:
        with pytest.raises(ValueError, match="is not within"):
            dataset.tokens(a, b)


def test_missing_and_unfinished_directories_say_what_to_run(tmp_path, prepared):
    with pytest.raises(ConfigError, match=r"no such directory; prepare it, .*hydra-dist data prepare --input stdlib"):
        Dataset(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"holds no prepared data \(no manifest.json\)"):
        Dataset(tmp_path)
    (prepared / "manifest.json").rename(prepared / "progress.json")
    with pytest.raises(ConfigError, match="was not finished; run the same"):
        Dataset(prepared)


def test_splits_that_are_not_there(prepared, tree, tmp_path):
    with pytest.raises(ConfigError, match=r'split \'evla\' does not exist \(did you mean "eval"\?\)'):
        Dataset(prepared, "evla")
    prepare([tree(60)], tmp_path / "all", "byte", eval_fraction=0)
    assert Dataset(tmp_path / "all").num_documents == 60
    with pytest.raises(ConfigError, match=r"eval split is empty \(--eval-fraction was 0, of 60 documents\)"):
        Dataset(tmp_path / "all", "eval")


def edit(directory, change):
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def first(manifest):
    return manifest["splits"]["train"][0]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(format=7), "format 7, but this version reads format 1"),
        (lambda m: m.pop("format"), "format None"),
        (lambda m: m.pop("splits"), "splits: Field required"),
        (lambda m: m.update(surplus=1), "surplus: Extra inputs"),
        (lambda m: first(m).update(tokens="9"), r"splits.train.0.tokens: Input should be a valid integer"),
        (lambda m: first(m)["data"].update(name="../train-00000.bin"), "is not a plain file name"),
        (lambda m: first(m)["index"].update(name="/etc/passwd"), "is not a plain file name"),
        (lambda m: m["tokenizer"]["file"].update(name="a/../../t.json"), "is not a plain file name"),
        (lambda m: first(m)["data"].update(name=".."), "is not a plain file name"),
        (lambda m: m.update(dtype="uint32"), "dtype uint32 does not go with a vocabulary of 300"),
        (lambda m: first(m).update(tokens=first(m)["tokens"] + 1), "train-00000.bin of .* bytes should be"),
        (lambda m: m["tokenizer"].update(byte_level=False), "train-00000.bin lacks its token bytes"),
        (lambda m: first(m).update(documents=first(m)["documents"] + 1), "documents are expected"),
    ],
)
def test_altered_manifests(prepared, change, message):
    edit(prepared, change)
    with pytest.raises(RunError, match=message) as caught:
        Dataset(prepared)
    assert str(prepared) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_unreadable_manifests(prepared, content):
    (prepared / "manifest.json").write_bytes(content)
    with pytest.raises(RunError, match=r"manifest\.json: .*prepare` again"):
        Dataset(prepared)


FILES = ["train-00001.bin", "train-00001.idx.npy", "tokenizer.json"]


@pytest.mark.parametrize("name", FILES)
def test_truncated_longer_and_missing_files_are_found_on_opening(prepared, name):
    path = prepared / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(RunError, match=f"{name}: truncated"):
        Dataset(prepared)
    path.write_bytes(whole + b"x")
    with pytest.raises(RunError, match=f"{name}: altered"):
        Dataset(prepared)
    path.unlink()
    with pytest.raises(RunError, match=f"{name}: listed in the manifest, but cannot be read"):
        Dataset(prepared)


@pytest.mark.parametrize("name", FILES)
def test_one_wrong_byte_is_found_by_verify(prepared, name):
    path = prepared / name
    data = bytearray(path.read_bytes())
    data[-11] ^= 1
    path.write_bytes(data)
    Dataset(prepared)  # sizes alone do not see it
    with pytest.raises(RunError, match=f"{name}: altered, its sha256"):
        Dataset(prepared, verify=True)


def rewrite(directory, name, data):
    """Replace a file and its checksum: damage that only its content shows."""
    import hashlib

    (directory / name).write_bytes(data)
    text = (directory / "manifest.json").read_text()
    manifest = json.loads(text)
    for shard in manifest["splits"]["train"]:
        for file in (shard["data"], shard["index"]):
            if file["name"] == name:
                file.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_ids_beyond_the_vocabulary(prepared):
    data = np.fromfile(prepared / "train-00000.bin", dtype=np.uint16)
    data[7] = 300
    rewrite(prepared, "train-00000.bin", data.tobytes())
    dataset = Dataset(prepared)
    message = "train-00000.bin: token id 300 at 7 is beyond the vocabulary of 300"
    with pytest.raises(RunError, match=message):
        dataset.tokens(5, 9)
    with pytest.raises(RunError, match=message):
        dataset.verify()
    assert len(dataset.tokens(8, 20)) == 12


def test_indices_that_cannot_be(prepared):
    index = np.load(prepared / "train-00000.idx.npy")
    swapped = index.copy()
    swapped[[1, 2]] = swapped[[2, 1]]
    rewrite(prepared, "train-00000.idx.npy", npy_bytes(swapped))
    with pytest.raises(RunError, match=r"train-00000\.idx\.npy: documents out of order"):
        Dataset(prepared, verify=True)
    for wrong, message in [
        (index + 1, "does not span"),
        (index[:-1], "documents are expected"),
        (index.astype(np.float64), "documents are expected"),
    ]:
        rewrite(prepared, "train-00000.idx.npy", npy_bytes(wrong))
        with pytest.raises(RunError, match=message):
            Dataset(prepared)
    rewrite(prepared, "train-00000.idx.npy", b"no array")
    with pytest.raises(RunError, match="no index can be read"):
        Dataset(prepared)


def test_pickled_indices_are_never_loaded(prepared):
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    rewrite(prepared, "train-00000.idx.npy", buffer.getvalue())
    with pytest.raises(RunError, match="no index can be read"):
        Dataset(prepared)


def test_wide_vocabularies_are_stored_in_four_bytes(tmp_path, tree):
    import tokenizers
    from tokenizers import models, pre_tokenizers

    words = {"?": 0} | {f"w{n}": n for n in range(1, 70000)}
    pipeline = tokenizers.Tokenizer(models.WordLevel(words, unk_token="?"))
    pipeline.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pipeline.save(str(tmp_path / "words.json"))
    (tmp_path / "text.txt").write_text("w1 w69999  \n  \t")
    (tmp_path / "blank.txt").write_text("  \n")  # text without any token: its bytes go to the document's end
    inputs = [tmp_path / "text.txt", tmp_path / "blank.txt"]
    dataset = Dataset(prepare(inputs, tmp_path / "data", str(tmp_path / "words.json"), eval_fraction=0).directory)
    assert dataset.manifest.dtype == "uint32"
    assert 69999 in dataset.tokens(0, dataset.num_tokens)
    assert dataset.text_bytes_of(0, dataset.num_tokens).sum() == dataset.text_bytes == 15 + 3
    np.testing.assert_array_equal(dataset.text_bytes_of(2, 5), dataset.text_bytes_of(0, dataset.num_tokens)[2:5])
    dataset.verify()
    sidecar = dataset.directory / "train-00000.bytes.bin"
    data = bytearray(sidecar.read_bytes())
    data[0] ^= 1
    sidecar.write_bytes(data)
    with pytest.raises(RunError, match=r"train-00000\.bytes\.bin: altered"):
        dataset.verify()


def test_a_model_with_too_small_a_vocabulary_is_refused(prepared):
    dataset = Dataset(prepared)
    check_vocabulary(dataset, 300)
    with pytest.raises(ConfigError, match=r"model\.vocab_size 299 is smaller .* 300 or more works"):
        check_vocabulary(dataset, 299)


def test_the_tokenizer_is_checked_and_named(prepared):
    dataset = Dataset(prepared)
    assert dataset.tokenizer_path == prepared / "tokenizer.json"
    assert dataset.tokenizer.vocab_size == dataset.vocab_size == 300
    text = dataset.tokenizer_path.read_text()
    dataset.tokenizer_path.write_text(text.replace("<|end|>", "<|fin|>"))
    with pytest.raises(RunError, match=r"tokenizer\.json: altered"):
        _ = Dataset(prepared).tokenizer
