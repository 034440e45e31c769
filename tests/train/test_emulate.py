"""A configuration's ranks in one process train as one rank does, and what is broken does not pass for it."""

import re
import sys

import pytest
import torch
import yaml

from hydra_dist.cli import main
from hydra_dist.config import Config
from hydra_dist.context import halo, ring
from hydra_dist.train import emulate as module
from hydra_dist.train.emulate import Emulation, Step, emulate, report
from hydra_dist.train.preflight import preflight

STEPS = 2
CASES = {
    "ring": {"size": 3, "strategy": "ring"},
    "ring of rings": {"size": 4, "strategy": "ring", "inner_ring": 2, "layout": "contiguous"},
    "all_gather": {"size": 3, "strategy": "all_gather", "layout": "contiguous"},
    "ulysses": {"size": 4, "strategy": "ulysses"},
    "hybrid": {"size": 4, "strategy": "hybrid", "ulysses_size": 2},
    "balanced": {"size": 3, "strategy": "ring", "layout": "balanced"},
    "auto": {"size": 2, "strategy": "auto"},
}


@pytest.fixture
def settings(tiny_settings):
    """Packed documents, two micro-batches, and clipping that acts."""
    tiny_settings["train"] |= {"micro_batch_size": 2, "gradient_accumulation_steps": 2}
    tiny_settings["schedule"] = {"name": "constant", "warmup_steps": 0}
    tiny_settings["optimizer"] = {"learning_rate": 2e-3}
    return tiny_settings


def run(settings, **options):
    config = Config.model_validate(settings)
    prepared = preflight(config, "test", config.context.size)

    def batches(step):
        return [prepared.train.batch(step, range(first, first + 2), 4) for first in (0, 2)]

    return emulate(config, prepared.model, batches, steps=STEPS, device=torch.device("cpu"), timeout=60, **options)


@pytest.mark.parametrize("case", CASES)
def test_every_strategy_agrees_with_one_rank(case, settings):
    settings["context"] = CASES[case]
    found = run(settings)
    assert found.agrees
    assert max(found.difference) < 1e-5
    assert len(found.steps) == len(found.alone) == STEPS
    assert found.steps[0].loss - found.steps[1].loss > 0.05, "it does not train"
    assert found.steps[0].gradient_norm > 1.0, "clipping never acted"
    size = CASES[case]["size"]
    assert len(found.traffic) == size
    for way in ("forward", "backward"):
        assert sum(rank[way]["bytes"] for rank in found.traffic) > 0
    assert all(rank["forward"]["messages"] + rank["backward"]["messages"] > 0 for rank in found.traffic)
    assert found.peak_bytes is None
    text = report(found)
    assert text.startswith(f"{size} emulated ranks (")
    assert "they agree with one rank" in text
    assert len(re.findall(r"^step \d: loss .*; one rank: ", text, flags=re.M)) == STEPS


def test_what_is_left_out_is_said(settings):
    settings["context"] = {"size": 2}
    settings["zero"] = {"stage": 2}
    settings["train"]["compile"] = True
    found = run(settings, compare=False)
    assert found.left_out == ("zero.stage 2", "train.compile")
    assert "left out where ranks share a process: zero.stage 2, train.compile" in report(found)
    settings["zero"] = {"stage": 0}
    settings["train"] |= {"compile": False, "precision": "bf16_autocast"}
    found = run(settings)
    assert found.left_out == ()
    assert found.agrees
    assert found.precision == "bf16_autocast"
    assert "left out" not in report(found)


def test_grouped_queries_too(settings):
    settings["model"]["attention"] = "gqa"
    settings["context"] = {"size": 3, "layout": "striped"}
    assert run(settings).agrees


def test_traffic_is_what_all_steps_sent(settings):
    settings["context"] = CASES["ring"]
    first = run(settings, compare=False)
    settings["train"]["gradient_accumulation_steps"] = 1
    config = Config.model_validate(settings)
    prepared = preflight(config, "test", 3)
    half = emulate(
        config,
        prepared.model,
        lambda step: [prepared.train.batch(step, range(2), 4)],
        steps=1,
        device=torch.device("cpu"),
        compare=False,
    )
    messages = [rank["forward"]["messages"] for rank in half.traffic]
    assert min(messages) > 0
    # The first of two micro-batches in the first of two steps; which keys travel depends on documents.
    assert all(
        2 * few < rank["forward"]["messages"] <= 6 * few for few, rank in zip(messages, first.traffic, strict=True)
    )


def broken_halo(monkeypatch):
    """Rows before a chunk are zero, as if each chunk began a document."""
    begin = halo.HaloExchange.begin_gather

    def zeros(self, *inputs):
        finish = begin(self, *inputs)
        return lambda: [rows.zero_() for rows in finish()]

    monkeypatch.setattr(halo.HaloExchange, "begin_gather", zeros)


def broken_ring(monkeypatch):
    """Ranks compute with their own keys only."""
    attend = ring.attend_tiles

    def only_first(*inputs, fresh, **options):
        if fresh:
            attend(*inputs, fresh=fresh, **options)

    monkeypatch.setattr(ring, "attend_tiles", only_first)


def broken_sum(monkeypatch):
    """Each rank divides by its own targets, and the mean of ranks is taken."""
    passes = module._Run._passes

    def mean(self, context, batches, num_targets):
        return passes(self, context, batches, num_targets * context.size)

    monkeypatch.setattr(module._Run, "_passes", mean)


@pytest.mark.parametrize("breaks", [broken_halo, broken_ring, broken_sum])
def test_what_is_broken_does_not_agree(breaks, settings, monkeypatch):
    settings["context"] = CASES["ring"]
    breaks(monkeypatch)
    found = run(settings)
    assert not found.agrees
    assert max(found.difference) > 1e-3
    assert "they DIFFER from one rank" in report(found)


def test_no_number_agrees_with_nothing():
    found = Emulation(choice=None, precision="fp32", steps=[Step(1.0, 1.0)], alone=[], traffic=[], peak_bytes=None)
    assert found.agrees
    for step in (Step(float("nan"), 1.0), Step(1.0, float("inf"))):
        assert not Emulation(None, "fp32", [step], [], [], None).agrees
        good = Step(1.0, 1.0)
        assert not Emulation(None, "fp32", [good, good], [good, step], [], None).agrees
    assert not Emulation(None, "fp32", [Step(1.0, 1.0)], [Step(1.0, 1.001)], [], None).agrees


@pytest.fixture
def command(settings, tmp_path, capsys, monkeypatch):
    """``command(*arguments)``: exit code, what was printed, and errors."""
    settings["context"] = CASES["ring"]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hydra-dist", "emulate", str(path), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return call


def test_the_command_says_whether_ranks_agree(command, monkeypatch):
    code, printed, _ = command("--steps", "1", "--device", "cpu")
    assert code == 0
    assert "3 emulated ranks" in printed
    assert "step 1: loss" in printed
    assert "step 2" not in printed
    assert "they agree with one rank" in printed
    broken_ring(monkeypatch)
    code, printed, _ = command("--steps", "1", "--device", "cpu")
    assert code == 1
    assert "they DIFFER from one rank" in printed


def test_the_command_without_a_comparison(command, monkeypatch):
    broken_ring(monkeypatch)
    code, printed, _ = command("--steps", "1", "--device", "cpu", "--no-compare")
    assert code == 0
    assert "one rank" not in printed
    assert "MiB" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["context.size=5", "context.strategy=ulysses"],
            "error: {path}: context.size 5: layers of 4 and 2 query and key",
        ),
        (["context.stratgy=ring"], "context.stratgy: unknown key"),
    ],
)
def test_mistakes_end_with_2(command, tmp_path, arguments, words):
    code, printed, errors = command(*arguments)
    assert code == 2
    assert words.format(path=tmp_path / "run.yaml") in errors
    assert printed == ""
    assert errors.count("\n") == 1
