"""Estimates against the bytes that others measured: the bars, and that a wrong term misses them."""

import json
import time

import pytest

from hydra_dist.memory import megatron, megatron_layer, validate
from hydra_dist.memory.megatron_settings import MegatronSettings
from hydra_dist.memory.validate import (
    CASES,
    MEASURES,
    growth_slopes,
    load_rows,
    load_slopes,
    summarize,
    table,
)


@pytest.fixture(scope="module")
def rows():
    return load_rows()


def named(rows, prefix):
    found = [row for row in rows if row.name.startswith(prefix) and "peak" in row.measured]
    assert found
    return found


def test_all_rows_take_less_than_a_second_of_one_core():
    start = time.process_time()
    assert len(load_rows()) > 300
    assert time.process_time() - start < 1.0


BARS = {"steady": (0.005, 0.02), "first_peak": (0.003, 0.02), "peak": (0.003, 0.02)}
"""Median and 90th percentile."""


@pytest.mark.parametrize("measure", MEASURES)
def test_median_and_ninetieth_percentile(rows, measure):
    summary = summarize(rows, measure)
    assert summary.rows > 250
    assert summary.median <= BARS[measure][0], table(summary)
    assert summary.ninetieth <= BARS[measure][1], table(summary)


def test_rows_far_off_are_those_that_the_file_names(rows):
    document = json.loads((CASES / "megatron_gpt.json").read_text())
    far = {row.name for row in rows if "peak" in row.measured and abs(row.error()) > 0.05}
    assert far == {row["name"] for row in document["far_off"]}


@pytest.mark.parametrize("prefix", ["7b_tp4_pp1", "7b_tp1_pp4"])
def test_seven_billion_parameters(rows, prefix):
    for row in named(rows, prefix):
        assert abs(row.error("peak")) <= 0.004, row.name
        assert abs(row.error("steady")) <= 0.012, row.name


def test_fifteen_billion_parameters(rows):
    for row in named(rows, "15b"):
        assert abs(row.error("peak")) <= 0.015, row.name


def test_llama_2_of_another_author_on_the_rank_with_the_most():
    summary = summarize(load_rows("megatron_llama2"))
    assert summary.rows == 4
    assert abs(summary.worst[0].error()) <= 0.005, table(summary)


def test_slopes(rows):
    slopes = load_slopes(rows)
    assert len(slopes) >= 14
    assert {slope.name: slope.error for slope in slopes if abs(slope.error) > 0.03} == {}


def test_growth_after_the_first_step(rows):
    errors = sorted(abs(slope.error) for slope in growth_slopes(rows))
    assert len(errors) > 250
    assert errors[len(errors) // 2] <= 0.01
    assert errors[9 * len(errors) // 10] <= 0.03


def wrong(patch, module, name, change):
    before = getattr(module, name)
    patch.setattr(module, name, lambda *arguments: change(before(*arguments)))


@pytest.mark.parametrize(
    ("module", "name", "change"),
    [
        (megatron_layer, "norm_bytes", lambda size: size // 2),
        (megatron_layer, "mlp_bytes", lambda size: size * 5 // 4),
        (megatron_layer, "score_bytes", lambda size: size * 4 // 5),
        (megatron, "_mask", lambda size: 3 * size),
        (megatron, "passes_in_flight", lambda passes: tuple(count + 1 for count in passes)),
        (megatron, "_workspaces", lambda size: 0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_bars_above_reject_a_wrong_term(monkeypatch, module, name, change):
    wrong(monkeypatch, module, name, change)
    summary = summarize(load_rows())
    assert summary.median > BARS["peak"][0] or summary.ninetieth > BARS["peak"][1]


def test_the_bars_above_reject_logits_without_their_fp32(monkeypatch):
    monkeypatch.setitem(megatron.LOGIT_BYTES, "plain", 4)
    seven = named(load_rows(), "7b_tp4_pp1")
    assert min(abs(row.error("peak")) for row in seven) > 0.004


def test_the_slopes_above_reject_a_cross_entropy_without_its_copy(monkeypatch):
    monkeypatch.setitem(megatron.LOGIT_BYTES, "fused", 8)
    assert any(abs(slope.error) > 0.3 for slope in load_slopes(load_rows()))


def test_the_bars_above_reject_an_optimizer_that_is_not_sharded(monkeypatch):
    monkeypatch.setattr(MegatronSettings, "optimizer_shards", 1)
    assert max(abs(row.error("steady")) for row in named(load_rows(), "7b")) > 0.012


@pytest.mark.parametrize("name", ["megatron_gpt", "megatron_llama2"])
def test_every_row_has_its_source_and_every_row_left_out_its_reason(name):
    document = json.loads((CASES / f"{name}.json").read_text())
    assert document["source"].startswith("github.com/")
    assert len(document["commit"]) == 40
    names = [row["name"] for each in document["configurations"] for row in each["rows"]]
    left_out = [row["name"] for row in document["dropped"]]
    assert len(set(names + left_out)) == len(names + left_out)
    assert all(row["reason"] for row in document["dropped"])
    assert all(row["recorded"] for each in document["configurations"] for row in each["rows"])


def test_rows_left_out_as_copies_name_a_row_that_is_there(rows):
    document = json.loads((CASES / "megatron_gpt.json").read_text())
    kept = {row.name for row in rows}
    copies = [row["reason"] for row in document["dropped"] if row["reason"].startswith("the same bytes as ")]
    assert copies
    assert all(reason.removeprefix("the same bytes as ") in kept for reason in copies)


def test_summary_orders_by_distance_and_takes_the_nearest_rank():
    class Off:
        limiting = type("Phase", (), {"name": "loss"})

        def __init__(self, peak):
            self.peak = peak

    rows = [validate.Row(str(off), {"peak": 100}, Off(100 + off)) for off in (1, -2, 3, -4, 5, -6, 7, -8, 9, -10)]
    summary = summarize(rows, worst=2)
    assert summary.median == pytest.approx(0.055)
    assert summary.ninetieth == pytest.approx(0.09)
    assert [row.name for row in summary.worst] == ["-10", "9"]
    assert "10 rows, median error 5.50%, 90th percentile 9.00%" in table(summary)
    with pytest.raises(ValueError, match="no row has steady"):
        summarize(rows, "steady")
