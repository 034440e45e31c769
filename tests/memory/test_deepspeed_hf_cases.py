"""DeepSpeed's estimates against what others measured: the bars, and that a wrong term misses them."""

import json

import pytest

from hydra_dist.memory import deepspeed_hf
from hydra_dist.memory.deepspeed_hf_allocator import Allocator
from hydra_dist.memory.deepspeed_hf_layer import Layer
from hydra_dist.memory.deepspeed_hf_settings import GPU_BYTES, DeepSpeedSettings
from hydra_dist.memory.deepspeed_hf_step import Step
from hydra_dist.memory.shapes import DenseDecoder
from hydra_dist.memory.validate import CASES, load_bounds, load_deepspeed, load_failures, load_slopes, summarize, table

DOCUMENT = json.loads((CASES / "deepspeed_hf.json").read_text())
FAR_OFF = {row["name"] for row in DOCUMENT["far_off"]}


def errors():
    return {(row.name, metric): row.error(metric) for row in load_deepspeed() for metric in row.measured}


def slopes():
    return [slope.error for slope in load_slopes(load_deepspeed(), "deepspeed_hf")]


@pytest.fixture(scope="module")
def bounds():
    return {bound.name: bound for bound in load_bounds()}


def test_measured_rows():
    found = errors()
    assert len(found) == 12
    assert {name for (name, _), error in found.items() if abs(error) > 0.035} == FAR_OFF
    device = sorted(abs(error) for (name, metric), error in found.items() if metric == "device")
    assert device[len(device) // 2] <= 0.016


def test_the_table_names_the_metric():
    summary = summarize(load_deepspeed(), "device", worst=1)
    assert summary.rows == 9
    assert table(summary).startswith("device: 9 rows, median error 1.")
    assert "backward" in table(summary)


def test_slopes():
    assert len(slopes()) == 2
    assert all(abs(error) <= 0.03 for error in slopes())


def test_bytes_a_token_with_liger():
    row = next(row for row in load_deepspeed() if row.name == "8b_liger_300k")
    assert row.measured["device"] / 300_000 == pytest.approx(0.483e6, rel=1e-3)
    assert abs(row.error("device")) <= 0.03


def test_longest_sequences_within_the_bars_but_those_that_the_file_names(bounds):
    beyond = {name for name, bound in bounds.items() if not -0.10 <= bound.error <= 0.05}
    assert beyond == {row["name"] for row in DOCUMENT["beyond"]}
    assert all(bound.error > 0 for bound in bounds.values())  # what ran is never said not to fit


def test_longest_sequences_of_which_the_source_says_that_they_are(bounds):
    tight = [bound for bound in bounds.values() if bound.tight]
    assert len(tight) == 4
    assert {bound.name for bound in tight if not -0.10 <= bound.error <= 0.05} == {"A20"}


def test_what_was_short_is_found(bounds):
    named = [bound for bound in bounds.values() if bound.limit]
    assert len(named) == 3
    assert all(bound.solved.limit == bound.limit for bound in named)


def test_what_ran_out_of_memory_does_not_fit():
    failures = load_failures()
    assert len(failures) == 2
    assert all(said == found for said, found in failures.values())


def test_seventy_billion_parameters_on_one_node_are_bound_by_the_host(bounds):
    """A18: its file leaves checkpoints on the GPU, because the host is full of optimizer state as it is."""
    row = next(row for row in DOCUMENT["longest"] if row["name"] == "A18")
    settings = DeepSpeedSettings(sequence_length=1, **{**row["settings"], "offload_checkpoints": True})
    model = DenseDecoder(**DOCUMENT["models"][row["model"]])
    offloaded = deepspeed_hf.solve_longest(model, settings, GPU_BYTES[row["gpu"]], DOCUMENT["host"])
    assert offloaded.limit == "host"
    assert offloaded.sequence_length < row["sequence_length"] < bounds["A18"].solved.sequence_length


def test_metrics_are_ordered_in_every_row():
    for row in load_deepspeed():
        assert row.estimate.allocated < row.estimate.reserved < row.estimate.device


def missed():
    """Rows that the bars above would report."""
    return {name for (name, _), error in errors().items() if abs(error) > 0.035} - FAR_OFF


def test_the_bars_above_reject_logits_without_their_log_softmax_gradient(monkeypatch):
    def fewer(self):
        logits = 2 * self.settings.tokens * self.model.vocab_size
        self.memory.allocate("logits", 5 * logits, "loss")
        self.memory.free("logits")
        self.memory.allocate("g", self.layer.hidden, "gradients")

    monkeypatch.setattr(Step, "_plain", fewer)
    assert missed() >= {"8b_plain_32k", "8b_plain_65k"}
    assert any(abs(error) > 0.03 for error in slopes())


def test_the_bars_above_reject_attention_without_its_backward(monkeypatch):
    def fewer(self):
        for name, size in (("dq", self.query), ("dk", self.key), ("dv", self.key)):
            self.memory.allocate(name, size * (1 if name == "dq" else self.copies), "gradients")
        self.memory.free("do", "qg", "kg", "vg", "lse", "att")

    monkeypatch.setattr(Layer, "_attention_backward", fewer)
    assert missed() >= {"8b_liger_offload_tiled_1200k", "70b_sp64_10m"}


def test_the_bars_above_reject_collectives_whose_buffers_are_free_at_once(monkeypatch):
    at_once = Allocator.free
    monkeypatch.setattr(Allocator, "free", lambda self, *names, late=False: at_once(self, *names))
    assert missed()


def test_the_failure_above_is_missed_by_allocated_bytes_alone():
    row = DOCUMENT["fails"][0]
    memory = deepspeed_hf.estimate_deepspeed(
        DenseDecoder(**DOCUMENT["models"][row["model"]]), DeepSpeedSettings(**row["settings"])
    )
    assert memory.allocated < GPU_BYTES["H100-80"] < memory.device


def test_every_row_has_its_source_and_every_exception_its_reason():
    names = [row["name"] for key in ("rows", "longest", "fails") for row in DOCUMENT[key]]
    assert len(set(names)) == len(names)
    assert all(row["recorded"] for key in ("rows", "longest", "fails") for row in DOCUMENT[key])
    assert all(row["reason"] for key in ("far_off", "beyond", "dropped") for row in DOCUMENT[key])
    assert {row["name"] for row in DOCUMENT["far_off"] + DOCUMENT["beyond"]} <= set(names)
