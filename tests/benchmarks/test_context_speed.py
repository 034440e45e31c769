"""Context parallelism beside its peers: what is compared, how it is judged, and one small run of all of it."""

import pytest
import torch
import torch.distributed as dist

from benchmarks import context_peers, context_speed, context_worker
from benchmarks.context_peers import OneDevice, Problem, TilesAlone
from benchmarks.harness import Options
from hydra_dist.errors import ConfigError, RunError

OURS = "ours, ring zigzag"


def measured(errors=None, **seconds):
    """One round: 1 s on half of one device, and others as given in seconds."""
    times = {"one device": 1.0, "tiles alone": 1.0, OURS: 1.05, "peer": 1.1, "other": 1.2}
    times |= {name.replace("_", " "): value for name, value in seconds.items()}
    found = {name: 1e-7 for name in times if name != "tiles alone"} | (errors or {})
    return {
        "errors": {name: {"out": 0.0, "dq": error, "dk": 0.0, "dv": 0.0} for name, error in found.items()},
        "seconds": {name: [value] * 3 for name, value in times.items()},
        "processor": {name: [value / 2] * 3 for name, value in times.items()},
        "absent": {"third": "not installed"},
    }


def judged(**changes):
    return context_speed.judge(measured(**changes), context_speed.SETTINGS)


def test_the_claim_holds_on_good_numbers():
    result = judged()
    assert result.holds
    assert result.quantities[f"{OURS}, of ideal"].median == pytest.approx(1 / 1.05)
    assert "0.952 of the ideal" in result.finding
    assert "1.048 times as fast as the fastest peer, peer" in result.finding
    rows = {row[0]: row for row in result.table.rows}
    assert rows["ideal: one device / 2"][1] == 1000.0
    assert rows["peer"][3:6] == (pytest.approx(1 / 1.1), "0.909 to 0.909", pytest.approx(1.1 / 1.05))
    assert rows["peer"][7] == pytest.approx(550.0)
    assert rows["third (absent)"][1:] == ("",) * 8


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({"one_device": 0.94}, False),  # 0.895 of it
        ({"one_device": 0.95}, True),
        ({"peer": 1.04}, False),
        ({"peer": 1.05}, True),
        ({"peer": 1.04, "errors": {"peer": 1.0}}, True),  # wrong, so it does not count
        ({"peer": 1.04, "errors": {"peer": float("inf")}}, True),
        ({"errors": {"peer": 1.0, "other": 1.0}}, False),  # nobody to compare with
    ],
)
def test_each_bar_can_be_missed(changes, holds):
    result = judged(**changes)
    assert result.holds is holds
    assert ("peer: wrong, not counted" in result.finding) is ("errors" in changes)


def test_the_fastest_of_ours_is_judged():
    found = measured()
    for key, value in (("seconds", [0.9] * 3), ("processor", [0.4] * 3), ("errors", {"out": 1e-7})):
        found[key]["ours, gather zigzag"] = value
    result = context_speed.judge(found, context_speed.SETTINGS)
    assert "ours, gather zigzag reaches 1.111" in result.finding
    found["seconds"][OURS] = [0.8] * 3
    assert "ours, ring zigzag reaches 1.250" in context_speed.judge(found, context_speed.SETTINGS).finding


@pytest.mark.parametrize("name", [OURS, "one device"])
def test_wrong_results_of_ours_are_not_timed(name):
    with pytest.raises(RunError, match=f"{name} differs from one device in fp64 by 1.0e-03"):
        judged(errors={name: 1e-3})


def test_errors_are_relative_to_the_largest_value():
    exact = [torch.tensor([[[[1.0]], [[4.0]], [[-8.0]]]], dtype=torch.float64)] * 4
    positions = torch.tensor([0, 2])
    right = [torch.tensor([[[[1.0]], [[-8.0]]]])] * 4
    assert set(context_worker.relative_errors(right, exact, positions).values()) == {0.0}
    for wrong, error in ((torch.tensor([[[[1.0]], [[-7.0]]]]), 1 / 8), (right[0] * torch.nan, float("inf"))):
        assert context_worker.relative_errors([*right[:3], wrong], exact, positions)["dv"] == error
    # Rows in another order are other rows.
    assert context_worker.relative_errors(right, exact, positions.flip(0))["out"] > 1


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_tiles_alone_are_a_share_of_the_scores(num_ranks, monkeypatch):
    pairs = []

    def count(q, k, v, causal):
        rows, keys = q.shape[2], k.shape[2]
        pairs[-1] += rows * (rows + 1) // 2 if causal else rows * keys
        return q, q[..., 0]

    monkeypatch.setattr(context_peers, "flash", count)
    monkeypatch.setattr(context_peers, "flash_backward", lambda *tile: None)
    whole = Problem.random(120, (2, 1), 8, torch.float32)
    for rank in range(num_ranks):
        pairs.append(0)
        assert TilesAlone(whole, rank, num_ranks).step() == ()
    assert sum(pairs) == 120 * 121 // 2
    assert max(pairs) - min(pairs) == 0


def test_one_device_counts_as_a_share():
    whole = Problem.random(12, (4, 2), 8, torch.float64)
    candidate = OneDevice(whole, 4)
    assert candidate.share == 0.25
    out, *grads = candidate.step()
    scores = torch.einsum("bqhd,bkhd->bhqk", whole.q, whole.k.repeat_interleave(2, 2)) / 8**0.5
    scores.masked_fill_(torch.ones(12, 12, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(
        out, torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), whole.v.repeat_interleave(2, 2))
    )
    assert [x.shape for x in grads] == [whole.q.shape, whole.k.shape, whole.v.shape]


@pytest.fixture
def group():
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_peers_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setattr(context_peers, "PACKAGE", "no_such_package")
    monkeypatch.setattr(context_peers, "TORCH_RING_PARTS", ("_templated_ring_attention", "_gone"))
    whole = Problem.random(16, (2, 1), 8, torch.float32)
    ways, others = ["ring/zigzag", "ring/contiguous/1x1"], ["torch-alltoall", "ring-flash-attention"]
    candidates, absent = context_worker.gather(whole, ways, others)
    assert [each.name for each in candidates] == ["one device", "tiles alone", OURS, "ours, ring contiguous 1x1"]
    assert absent["ring-flash-attention"] == "the package no_such_package is not installed"
    assert absent["torch-alltoall"].endswith("has no _gone")
    seconds, processor = context_worker.in_turns(candidates, 2)
    assert {name: len(times) for name, times in seconds.items()} == {each.name: 2 for each in candidates}
    assert seconds.keys() == processor.keys()


def test_it_is_for_a_cpu():
    with pytest.raises(ConfigError, match="without --gpu it works"):
        context_speed.run(Options(device="cuda", settings=context_speed.SETTINGS))


def test_the_whole_benchmark_at_a_small_size():
    said = []
    settings = {**context_speed.SETTINGS, "sequence_length": 128, "rounds": 2, "heads": "4/2", "head_dim": 16}
    peers = "torch-alltoall,torch-allgather,ring-flash-attention"
    result = context_speed.run(Options(device="cpu", settings={**settings, "peers": peers}, say=said.append))
    names = [str(row[0]) for row in result.table.rows]
    ways = [OURS, "ours, all_gather zigzag", "ours, ulysses contiguous"]
    there = ["PyTorch's ring, alltoall", "PyTorch's ring, allgather"]
    assert names[:-1] == ["ideal: one device / 2", "tiles alone", *ways, *there]
    assert names[-1].startswith("ring-flash-attention (")  # absent, or wrong in fp32
