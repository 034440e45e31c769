"""Which benchmarks there are, and which rows wait for a GPU."""

import json

import pytest

from benchmarks.catalogue import (
    PendingRow,
    choose,
    expected_pending,
    find_benchmarks,
    read_pending,
    results_of,
    write_pending,
)
from benchmarks.result import read_record, write_record
from hydra_dist.errors import ConfigError, RunError

ON_A_GPU = '"""Fast on a GPU."""\nNEEDS_GPU = True\ndef run(options): ...\n'
ROWS = ON_A_GPU.replace("def", 'GPU_ROWS = {"one": "one H100", "eight": "8 x H100"}\ndef').replace(" =", ": bool =", 1)
ON_A_CPU = '"""Fast anywhere."""\nNEEDS_GPU = False\ndef run(options): ...\n'


@pytest.fixture
def three(tmp_path):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name, text in (("gpu", ON_A_GPU), ("rows", ROWS), ("cpu", ON_A_CPU), ("helper", "import torch\n")):
        (folder / f"{name}.py").write_text(text)
    return find_benchmarks(folder)


def test_a_benchmark_is_a_module_that_says_whether_it_needs_a_gpu(three):
    assert {name: benchmark.needs_gpu for name, benchmark in three.items()} == {"cpu": False, "gpu": True, "rows": True}
    assert three["cpu"].claim == "Fast anywhere."
    assert three["cpu"].gpu_rows == {}


@pytest.mark.parametrize(
    ("text", "lacks"),
    [("NEEDS_GPU = True\ndef run(options): ...\n", "docstring"), ('"""Claim."""\nNEEDS_GPU = True\n', "function run")],
)
def test_an_incomplete_benchmark_is_a_bug(tmp_path, text, lacks):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(ValueError, match=lacks):
        find_benchmarks(tmp_path)


def test_unknown_names_get_the_nearest(three):
    with pytest.raises(ConfigError, match=r'rwos: unknown.*"rows"'):
        choose(["rwos"], three)
    with pytest.raises(ConfigError, match="there are cpu, gpu, rows"):
        choose(["zzzzzz"], three)
    assert [benchmark.name for benchmark in choose(["gpu", "cpu", "gpu"], three)] == ["gpu", "cpu"]


def test_rows_wait_until_a_gpu_measured_them(three, tmp_path, make_record):
    results = tmp_path / "results"
    results.mkdir()

    def waiting():
        return [(row.benchmark, row.row) for row in expected_pending(three, results)]

    assert waiting() == [("gpu", "all"), ("rows", "one"), ("rows", "eight")]
    write_record(make_record("gpu", device="nvidia-h200"), results)
    write_record(make_record("rows", device="nvidia-h100", rows=("one",)), results)
    assert waiting() == [("rows", "eight")]
    # A number from a CPU is no number from a GPU.
    write_record(make_record("rows", device="cpu", rows=("eight",)), results)
    assert waiting() == [("rows", "eight")]
    assert [path.name for path in results_of("rows", results)] == ["rows.json", "rows-nvidia-h100.json"]


def test_the_list_comes_back_as_it_was_written(tmp_path):
    rows = [PendingRow(benchmark="rows", row="eight", needs="8 x H100")]
    write_pending(rows, tmp_path)
    assert read_pending(tmp_path) == rows
    (tmp_path / "pending.json").write_text('[{"benchmark": "rows"}]')
    with pytest.raises(RunError, match=r"pending.json: not a list of rows"):
        read_pending(tmp_path)
    (tmp_path / "pending.json").unlink()
    with pytest.raises(RunError, match=r"pending.json: cannot be read"):
        read_pending(tmp_path)


def test_pending_json_lists_the_rows_without_a_result_and_nothing_else():
    expected = expected_pending(find_benchmarks())
    found = sorted(read_pending(), key=str)
    wanted = json.dumps([row.model_dump() for row in expected], indent=2)
    assert found == sorted(expected, key=str), f"benchmarks/results/pending.json has to hold\n{wanted}"


def test_every_result_file_is_valid_and_of_a_benchmark():
    from benchmarks.catalogue import PENDING, RESULTS

    names = find_benchmarks()
    for path in RESULTS.glob("*.json"):
        if path.name != PENDING:
            record = read_record(path)
            assert record.name in names
            assert path.name == record.file_name


def test_listing_imports_no_torch(run_command):
    code = "import sys, benchmarks.catalogue as c; c.find_benchmarks(); assert 'torch' not in sys.modules"
    import sys

    assert run_command([sys.executable, "-c", code]).returncode == 0
