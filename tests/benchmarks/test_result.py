"""The result file: statistics, schema, writing."""

import json
import os
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from benchmarks import machine
from benchmarks.result import Record, Samples, read_record, write_atomically, write_record
from hydra_dist.errors import RunError


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_statistics_are_those_of_numpy(values):
    found = Samples.of(values, "s")
    assert found.median == pytest.approx(statistics.median(values))
    assert (found.minimum, found.maximum) == (min(values), max(values))
    lower, upper = np.percentile(values, [25, 75])
    assert found.lower_quartile == pytest.approx(lower, abs=1e-9)
    assert found.upper_quartile == pytest.approx(upper, abs=1e-9)
    assert found.raw == tuple(values)


def test_interquartile_range_differs_from_the_full_spread():
    found = Samples.of([1.0, 2.0, 3.0, 4.0, 100.0], "s")
    assert found.interquartile_range == 2.0


@pytest.mark.parametrize("values", [[], [float("nan")], [1.0, float("inf")]])
def test_no_sample_and_no_number_are_refused(values):
    with pytest.raises(ValueError, match=r"no samples|finite"):
        Samples.of(values, "s")


def test_a_record_comes_back_as_it_was_written(tmp_path, make_record):
    record = make_record()
    path = write_record(record, tmp_path / "results")
    assert path.name == "speed.json"
    assert read_record(path) == record
    assert json.loads(path.read_text())["schema_version"] == 1
    assert write_record(make_record(device="8x-nvidia-h200"), tmp_path).name == "speed-8x-nvidia-h200.json"


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("schema_version",), 2, "schema_version"),
        (("result", "quantities", "ratio", "median"), 0.6, "median"),
        (("result", "quantities", "ratio", "raw"), [0.4, 0.5, 0.8], "maximum"),
        (("result", "table", "rows"), [[1]], "columns"),
        (("machine", "cores"), "2", "cores"),
        (("surprise",), 1, "surprise"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, place, value, named, make_record):
    path = write_record(make_record(), tmp_path)
    whole = part = json.loads(path.read_text())
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    path.write_text(json.dumps(whole))
    with pytest.raises(RunError, match=rf"speed.json: not a result.*{named}"):
        read_record(path)


def test_missing_and_cut_off_files_are_named(tmp_path, make_record):
    with pytest.raises(RunError, match=r"none.json: cannot be read"):
        read_record(tmp_path / "none.json")
    path = write_record(make_record(), tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RunError, match=r"speed.json: not a result"):
        read_record(path)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "kept.json"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    for operation in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, operation, fail)
            with pytest.raises(RunError, match="No space left"):
                write_atomically(path, "new")
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["kept.json"]


def test_table_as_markdown(make_record):
    assert make_record().result.table.markdown() == (
        "| tokens | ratio |\n| --- | --- |\n| 8,192 | 0.1235 |\n| 16,384 | 2 |"
    )


def test_a_setting_keeps_its_type(make_record):
    settings = Record.model_validate_json(make_record().model_dump_json()).settings
    assert [type(value) for value in settings.values()] == [int, float, str, bool]


def test_records_are_frozen(make_record):
    with pytest.raises(ValidationError):
        make_record().name = "other"


def test_machine_and_versions_of_this_machine():
    found = machine.describe_machine()
    assert found.processor
    assert found.cores >= 1
    assert found.memory_gib > 0.1
    versions = machine.describe_versions()
    assert set(versions) == {"python", "torch", "triton", "deepspeed", "numpy"}
    assert versions["numpy"] == np.__version__


def test_device_tags():
    assert machine.device_tag(("NVIDIA H200",)) == "nvidia-h200"
    assert machine.device_tag(("NVIDIA A100-SXM4-80GB",) * 8) == "8x-nvidia-a100-sxm4-80gb"


def test_commit_says_whether_the_tree_differs(tmp_path, run_command):
    assert machine.describe_commit(tmp_path) is None
    (tmp_path / "file").write_text("a")
    author = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "first"]):
        assert run_command(["git", *command], cwd=tmp_path).returncode == 0
    clean = machine.describe_commit(tmp_path)
    assert clean is not None
    assert len(clean.hash) == 40
    assert not clean.dirty
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "speed.json").write_text("{}")
    found = machine.describe_commit(tmp_path)
    assert found is not None
    assert not found.dirty
    (tmp_path / "file").write_text("b")
    found = machine.describe_commit(tmp_path)
    assert found is not None
    assert found.dirty
