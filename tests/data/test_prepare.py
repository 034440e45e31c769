import errno
import itertools
import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from hydra_dist.data import Dataset, prepare
from hydra_dist.data import files as files_module
from hydra_dist.data import prepare as prepare_function
from hydra_dist.errors import ConfigError, RunError

SETTINGS = {"shard_tokens": 400, "shuffle_bytes": 4000, "eval_fraction": 0.25}


@pytest.fixture
def corpus(tree):
    return tree(60)


def test_several_blocks_and_shards_are_written(corpus, tmp_path):
    prepared = prepare([corpus], tmp_path / "out", "train:290", **SETTINGS)
    assert prepared.outcome == "written"
    train = prepared.manifest.shards("train")
    assert len(train) > 3
    assert len({shard.block for shard in train}) > 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        ["manifest.json", "tokenizer.json"]
        + [file.name for split in ("train", "eval") for s in prepared.manifest.shards(split) for file in s.files]
    )
    for split in ("train", "eval"):
        Dataset(tmp_path / "out", split, verify=True)
    assert prepared.manifest.total("train", "documents") + prepared.manifest.total("eval", "documents") == 60
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


def test_the_same_input_gives_the_same_bytes_and_other_settings_give_others(corpus, tmp_path, read_all):
    prepare([corpus], tmp_path / "a", "train:290", **SETTINGS)
    prepare([str(corpus) + "/."], tmp_path / "b", "train:290", **SETTINGS)
    assert read_all(tmp_path / "a") == read_all(tmp_path / "b")
    prepare([corpus], tmp_path / "c", "train:290", **SETTINGS, seed=1)
    assert read_all(tmp_path / "c")["train-00000.bin"] != read_all(tmp_path / "a")["train-00000.bin"]


def held_out(directory):
    dataset = Dataset(directory, "eval")
    ids = dataset.tokens(0, dataset.num_tokens)
    starts = [*sorted(set(dataset.document_starts(0, len(ids)).tolist())), len(ids)]
    return sorted(dataset.tokenizer.decode(ids[a:b]) for a, b in itertools.pairwise(starts))


def test_what_is_held_out_depends_on_names_alone(corpus, tmp_path):
    prepare([corpus], tmp_path / "a", "byte", **SETTINGS)
    prepare([corpus], tmp_path / "b", "train:300", **(SETTINGS | {"shuffle_bytes": 10**9}), seed=3)
    assert held_out(tmp_path / "a") == held_out(tmp_path / "b")
    prepare([corpus], tmp_path / "c", "byte", **(SETTINGS | {"eval_fraction": 0.2}))
    assert held_out(tmp_path / "c") != held_out(tmp_path / "a")


def test_the_tokenizer_never_sees_held_out_text(corpus, tmp_path, monkeypatch):
    seen = []
    real = prepare_module().train_tokenizer
    monkeypatch.setattr(prepare_module(), "train_tokenizer", lambda texts, n: real(seen.extend(texts) or seen, n))
    prepare([corpus], tmp_path / "a", "train:290", **SETTINGS)
    assert seen
    assert not set(held_out(tmp_path / "a")) & set(seen)


def prepare_module():
    return sys.modules[prepare_function.__module__]


def test_large_corpora_train_the_tokenizer_on_a_pick(corpus, tmp_path, monkeypatch):
    total = sum(p.stat().st_size for p in corpus.rglob("*.txt"))
    monkeypatch.setattr(prepare_module(), "TOKENIZER_BYTES", total // 3)
    picked = []
    real = prepare_module().train_tokenizer
    monkeypatch.setattr(prepare_module(), "train_tokenizer", lambda texts, n: real(picked.extend(texts) or picked, n))
    prepared = prepare([corpus], tmp_path / "a", "train:290", **SETTINGS)
    assert 0.1 < sum(len(t.encode()) for t in picked) / total < 0.6
    assert "picked by a hash" in prepared.manifest.tokenizer.notes[0]


def test_documents_of_a_block_are_shuffled(corpus, tmp_path):
    prepare([corpus], tmp_path / "a", "byte", eval_fraction=0)
    dataset = Dataset(tmp_path / "a")
    ids = dataset.tokens(0, dataset.num_tokens)
    lines = dataset.tokenizer.decode([10 if i == dataset.end_id else i for i in ids.tolist()]).split("\n")
    words = [line.split()[-1] for line in lines if line.split()]
    numbers = [int(word) for word in words if word.isdigit()]  # the last word of each text is its number
    assert len(numbers) >= 50
    ascending = sum(a < b for a, b in itertools.pairwise(numbers)) / len(numbers)
    assert 0.25 < ascending < 0.75


def test_a_second_run_does_nothing(corpus, tmp_path, read_all):
    first = prepare([corpus], tmp_path / "a", "byte", **SETTINGS)
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "a").iterdir()}
    os.utime(next(corpus.rglob("*.txt")))  # a fresh checkout of the same content
    second = prepare([corpus], tmp_path / "a", "byte", **SETTINGS)
    assert (first.outcome, second.outcome) == ("written", "unchanged")
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "a").iterdir()} == times


def test_an_output_with_another_corpus_is_refused(corpus, tmp_path, read_all):
    prepare([corpus], tmp_path / "a", "byte", **SETTINGS)
    before = read_all(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"holds another corpus \(tokenizer: byte here, train:300 asked for\)"):
        prepare([corpus], tmp_path / "a", "train:300", **SETTINGS)
    path = next(corpus.rglob("*.txt"))
    path.write_bytes(path.read_bytes()[:-1] + b"X")  # the size stays
    with pytest.raises(ConfigError, match=r"another corpus \(the content of the input files\)"):
        prepare([corpus], tmp_path / "a", "byte", **SETTINGS)
    assert read_all(tmp_path / "a") == before


def test_foreign_and_damaged_outputs_are_refused(corpus, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.doc").write_text("x")
    with pytest.raises(ConfigError, match=r"not empty \(thesis\.doc is in it\)"):
        prepare([corpus], tmp_path / "home", "byte")
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["thesis.doc"]
    prepare([corpus], tmp_path / "a", "byte", **SETTINGS)
    shard = tmp_path / "a" / "train-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(RunError, match=r"train-00001\.bin: truncated"):
        prepare([corpus], tmp_path / "a", "byte", **SETTINGS)


def test_outputs_that_cannot_be_written(corpus, tmp_path):
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunError, match=r"cannot be written .*another --output"):
            prepare([corpus], output, "byte")
    with pytest.raises(ConfigError, match="lies within"):
        prepare([corpus], corpus / "out", "byte")
    assert not (corpus / "out").exists()


def test_empty_input_leaves_no_trace(tmp_path, tree):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.txt: empty, no document with text in it \(1 empty\)"):
        prepare([tmp_path / "empty.txt"], tmp_path / "out", "byte")
    assert list((tmp_path / "out").iterdir()) == []
    root = tree(2)
    with pytest.raises(ConfigError, match=r"all documents \(2\) are held out .*--eval-fraction 0 works"):
        prepare([root], tmp_path / "out", "byte", eval_fraction=0.9999)
    assert list((tmp_path / "out").iterdir()) == []
    assert prepare([root], tmp_path / "out", "byte", eval_fraction=0).outcome == "written"


def test_sizes_that_are_none(corpus, tmp_path):
    for name in ("shard_tokens", "shuffle_bytes"):
        with pytest.raises(ConfigError, match=f"{name} 0 is not a size"):
            prepare([corpus], tmp_path / "a", "byte", **{name: 0})
    assert not (tmp_path / "a").exists()


def test_undecodable_input_stops_and_goes_on_where_skipping_is_asked_for(tree, tmp_path, read_all):
    root = tree(60)
    (root / "zz.txt").write_bytes(b"\xff")
    with pytest.raises(RunError, match=r"zz\.txt: not UTF-8 at byte 0"):
        prepare([root], tmp_path / "a", "byte", **SETTINGS)
    assert not (tmp_path / "a" / "manifest.json").exists()
    prepared = prepare([root], tmp_path / "a", "byte", **SETTINGS, skip_undecodable=True)
    assert prepared.outcome == "resumed"
    assert prepared.manifest.skipped == ["corpus/zz.txt: not UTF-8 at byte 0 (invalid start byte)"]
    prepare([root], tmp_path / "b", "byte", **SETTINGS, skip_undecodable=True)
    assert read_all(tmp_path / "a") == read_all(tmp_path / "b")


KILLED = """
import os, signal, sys
from hydra_dist.data import prepare
from hydra_dist.data import files
real, left = os.replace, [int(sys.argv[3])]
def replace(*paths):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    real(*paths)
os.replace = replace
prepare([sys.argv[1]], sys.argv[2], "train:290", shard_tokens=400, shuffle_bytes=4000, eval_fraction=0.25)
print("finished")
"""


def killed(corpus, output, renames):
    """Prepare in another process that is killed (-9) just before its n-th rename."""
    command = [sys.executable, "-c", KILLED, str(corpus), str(output), str(renames)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def test_killed_anywhere_and_started_again_ends_with_the_same_bytes(corpus, tmp_path, read_all):
    prepare([corpus], tmp_path / "whole", "train:290", **SETTINGS)
    whole = read_all(tmp_path / "whole")
    # The journal, the tokenizer and the journal again; then for each shard its two files and the journal.
    renames = 3 + 3 * sum(name.endswith(".idx.npy") for name in whole)
    # Before anything, around the tokenizer, within a shard and behind it, and before the manifest's own rename.
    for n in (0, 1, 2, 4, 5, 6, renames // 2, renames):
        output = tmp_path / f"killed{n}"
        assert killed(corpus, output, n)
        assert not (output / "manifest.json").exists()
        with pytest.raises(ConfigError):
            Dataset(output)
        prepared = prepare([corpus], output, "train:290", **SETTINGS)
        assert prepared.outcome == ("resumed" if n > 5 else "written")
        assert read_all(output) == whole
    assert not killed(corpus, tmp_path / "last", renames + 1)


def test_finished_shards_are_not_written_again(corpus, tmp_path):
    output = tmp_path / "a"
    assert killed(corpus, output, 16)
    kept = {p.name: p.stat().st_ino for p in output.glob("*.bin")}
    progress = json.loads((output / "progress.json").read_text())
    finished = {s["data"]["name"] for shards in progress["shards"].values() for s in shards}
    assert len(finished) >= 3
    prepare([corpus], output, "train:290", **SETTINGS)
    assert all((output / name).stat().st_ino == kept[name] for name in finished)


def test_damage_to_an_unfinished_output_is_written_again(corpus, tmp_path, read_all):
    prepare([corpus], tmp_path / "whole", "train:290", **SETTINGS)
    output = tmp_path / "a"
    assert killed(corpus, output, 22)
    data = bytearray((output / "train-00001.bin").read_bytes())
    data[5] ^= 1
    (output / "train-00001.bin").write_bytes(data)
    prepared = prepare([corpus], output, "train:290", **SETTINGS)
    assert prepared.notes == ["train-00001.bin was damaged and has been written again"]
    assert read_all(output) == read_all(tmp_path / "whole")


def test_an_unfinished_output_of_another_corpus_is_refused_but_not_if_nothing_was_finished(corpus, tmp_path, tree):
    assert killed(corpus, tmp_path / "a", 16)
    with pytest.raises(ConfigError, match=r"unfinished preparation of another corpus \(seed: 0 here, 1 asked for\)"):
        prepare([corpus], tmp_path / "a", "train:290", **SETTINGS, seed=1)
    assert killed(corpus, tmp_path / "b", 3)
    assert prepare([corpus], tmp_path / "b", "byte", **SETTINGS).outcome == "written"


def test_killed_between_the_manifest_and_the_clean_up(corpus, tmp_path, read_all):
    assert killed(corpus, tmp_path / "a", 16)
    progress = (tmp_path / "a" / "progress.json").read_bytes()
    prepare([corpus], tmp_path / "a", "train:290", **SETTINGS)
    whole = read_all(tmp_path / "a")
    (tmp_path / "a" / "progress.json").write_bytes(progress)
    assert prepare([corpus], tmp_path / "a", "train:290", **SETTINGS).outcome == "unchanged"
    assert read_all(tmp_path / "a") == whole


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_finished_shards_and_nothing_looks_complete(corpus, tmp_path, monkeypatch, read_all, code):
    prepare([corpus], tmp_path / "whole", "byte", **SETTINGS)
    real, syncs = os.fsync, [0]

    def full(handle):
        syncs[0] += 1
        if syncs[0] > 20:
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(files_module.os, "fsync", full)
    with pytest.raises(RunError, match=r"no space left to write to .*run the same command again"):
        prepare([corpus], tmp_path / "a", "byte", **SETTINGS)
    monkeypatch.undo()
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert "manifest.json" not in names
    assert not any(name.endswith(".tmp") for name in names)
    assert prepare([corpus], tmp_path / "a", "byte", **SETTINGS).outcome == "resumed"
    assert read_all(tmp_path / "a") == read_all(tmp_path / "whole")


def test_a_file_size_limit_of_the_system_is_met_like_a_full_disk(corpus, tmp_path):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (7000, 7000))\n"
        "from hydra_dist.data import prepare\nfrom hydra_dist.errors import RunError\n"
        "try: prepare([sys.argv[1]], sys.argv[2], 'byte')\nexcept RunError as error: print(error); sys.exit(1)"
    )
    command = [sys.executable, "-c", code, str(corpus), str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "no space left to write to (File too large)" in done.stdout
    assert not (tmp_path / "a" / "manifest.json").exists()
    assert not list((tmp_path / "a").glob("*.tmp"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 7000


def test_two_at_a_time_in_one_directory_are_refused(corpus, tmp_path):
    def again(phase, done, total):
        if phase == "tokenizing":
            prepare([corpus], tmp_path / "a", "byte", **SETTINGS)

    with pytest.raises(RunError, match="another process is preparing data there"):
        prepare([corpus], tmp_path / "a", "byte", **SETTINGS, progress=again)
    assert prepare([corpus], tmp_path / "a", "byte", **SETTINGS).manifest


def test_progress_rises_to_the_whole(corpus, tmp_path):
    seen = {}

    def note(phase, done, total):
        seen.setdefault(phase, []).append((done, total))

    prepare([corpus], tmp_path / "a", "train:290", **SETTINGS, progress=note)
    assert list(seen) == ["reading", "training the tokenizer", "tokenizing"]
    for steps in seen.values():
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1] > 0


def test_all_kinds_of_input_together(tree, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tree(10)
    (root / "rows.jsonl").write_text('{"body": "in a line"}\n')
    pq.write_table(pa.table({"body": ["in a row", "another"]}), tmp_path / "t.parquet")
    prepared = prepare([root, tmp_path / "t.parquet"], tmp_path / "a", "byte", field="body", eval_fraction=0)
    assert prepared.manifest.total("train", "documents") == 13
    dataset = Dataset(tmp_path / "a", verify=True)
    text = dataset.tokenizer.decode(dataset.tokens(0, dataset.num_tokens))
    assert all(part in text for part in ("in a line", "in a row", "another"))
