"""Overlap over slow links: how links and exchanges are set, and how what was measured is judged."""

import os
import time

import pytest
import torch

from benchmarks import overlap, overlap_worker, slow_link
from benchmarks.harness import Options
from hydra_dist.context import DistributedTransport
from hydra_dist.errors import RunError

COMPUTE = {"forward": 2.0, "forward and backward": 7.0}


def case(kind="computed", ranks=2, ring=1.02, waiting=1.35, share=0.8, errors=None):
    seconds = {
        name: {"compute": [c] * 3, "ring": [c * ring] * 3, "synchronous": [c * waiting] * 3}
        for name, c in COMPUTE.items()
    }
    seconds["transfer"] = [share * COMPUTE["forward"] / ranks] * 3
    found = {"compute": 0.9, "ring": 1e-7, "synchronous": 1e-7, **(errors or {})}
    measured = {"seconds": seconds, "bits_per_second": 2e8, "bytes": 1000, "errors": found}
    return overlap.Case.of(kind, ranks, measured)


def test_the_claim_holds_on_good_numbers():
    result = overlap.judge([case(), case("slept", 4, ring=1.06)], overlap.SETTINGS)
    assert result.holds
    assert result.finding == (
        "the ring takes at most 1.060 times its pure compute (bound 1.1), and at least 1.350 times where it waits at "
        "each hop"
    )
    first = result.table.rows[0]
    assert first[:4] == ("2 ranks, computed: forward", "0.80 of its compute", 2000.0, pytest.approx(1.02))
    assert first[4:] == ("1.020 to 1.020", pytest.approx(1.35))
    assert result.counts["4 ranks, slept, link in bits a second"] == 200_000_000


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ring": 1.11}, "2 ranks, computed: forward: 1.110"),
        ({"waiting": 1.09}, "waiting at each hop takes 1.090 and should not pass"),
        ({"share": 0.6}, "a hop's transfer takes 0.60 of its compute"),
        ({"share": 0.79}, "a hop's transfer takes 0.79 of its compute"),
    ],
)
def test_each_condition_can_be_missed(changes, said):
    result = overlap.judge([case(), case(**changes)], overlap.SETTINGS)
    assert not result.holds
    assert said in result.finding


@pytest.mark.parametrize(
    ("errors", "said"),
    [({"ring": 1e-3}, r"ring: .* by 1.0e-03 \(bound 5e-06\)"), ({"compute": 1e-7}, "although nothing was sent")],
)
def test_outputs_are_looked_at(errors, said):
    with pytest.raises(RunError, match=said):
        overlap.judge([case(errors=errors)], overlap.SETTINGS)


class Started:
    """A transfer that counts how often it is waited for."""

    waits = 0

    def wait(self):
        self.waits += 1


def test_exchanges_send_nothing_or_wait(monkeypatch):
    sent, work = [], Started()

    def exchange(self, sends, receives, **labels):
        sent.append(labels)
        return work

    monkeypatch.setattr(DistributedTransport, "exchange", exchange)
    received = torch.full((3,), torch.nan)
    labels = {"direction": "forward", "kind": "keys"}

    def through(mode):
        with overlap_worker.transfers(mode):
            return DistributedTransport.exchange(None, [], [(1, received)], **labels)

    through("compute").wait()
    assert sent == []
    assert received.tolist() == [0.0] * 3
    assert through("ring") is work
    assert (work.waits, sent) == (0, [labels])
    later = through("synchronous")
    assert (work.waits, sent) == (1, [labels] * 2)
    later.wait()
    assert work.waits == 1  # a gloo transfer must not be waited for twice
    assert DistributedTransport.exchange is exchange

    def fails_inside():
        with overlap_worker.transfers("compute"):
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fails_inside()
    assert DistributedTransport.exchange is exchange


def test_arithmetic_sleeps_by_its_scores(monkeypatch):
    from benchmarks.cpu_flash import flash, flash_backward

    naps = []
    monkeypatch.setattr(time, "sleep", naps.append)
    q, k = torch.randn(1, 2, 10, 4), torch.randn(1, 1, 20, 4)
    with overlap_worker.sleeping(0.5):
        out, lse = flash(q, k, k, False)
        flash(q, q, q, True)
        grads = flash_backward(q, q, k, k, out, lse, False)
    assert naps == [0.5 * 200, 0.5 * 55, 0.5 * 2.5 * 200]
    assert [x.shape for x in (out, lse, *grads)] == [q.shape, (1, 2, 10), q.shape, k.shape, k.shape]
    assert flash(q, q, q, True)[0].abs().sum() > 0
    assert len(naps) == 3


def test_the_link_is_set_until_a_hop_takes_its_share(monkeypatch):
    """A link that gives 0.7 of what it is set to, and a hop's compute of 50 ms."""
    set_to = []
    monkeypatch.setattr(overlap_worker, "shape", set_to.append)
    monkeypatch.setattr(
        overlap_worker, "timed", lambda work, mode: 0.1 if mode == "compute" else 8 * 2e6 / (0.7 * set_to[-1])
    )
    hop = overlap_worker.Hop(overlap_worker.Problem.random(8, (2, 1), 4, torch.float32))
    assert hop.bytes == 2 * 8 * 4 * 4
    hop.bytes = 2_000_000
    bits = overlap_worker.calibrate(lambda: None, hop, 0.8, 2)
    assert len(set_to) == 2
    assert bits == set_to[-1] == pytest.approx(8 * 2e6 / 0.04 / 0.7)


class Commands:
    """Stands for a machine's ip: records commands, and fails from the one that contains ``fails`` on."""

    def __init__(self, monkeypatch, fails=None, namespaces=""):
        self.run, self.fails, self.namespaces = [], fails, namespaces
        monkeypatch.setattr(slow_link, "_run", self)

    def __call__(self, *command):
        text = " ".join(command)
        self.run.append(text)
        if self.fails and self.fails in text:
            raise RunError(f"{text}: Operation not permitted")
        return self.namespaces if text == "ip netns list" else ""

    def left(self):
        added = [text.split()[-1] for text in self.run if " netns add " in text]
        return [name for name in added if f"ip netns delete {name}" not in self.run]


def test_hosts_get_an_address_each_and_are_removed(monkeypatch):
    commands = Commands(monkeypatch)
    with slow_link.hosts(2) as made:
        assert made.address == "10.213.77.1"
        assert [place.prefix[:3] for place in made.places] == [("ip", "netns", "exec")] * 2
        assert made.places[0].environment == {"GLOO_SOCKET_IFNAME": "wire"}
        assert len(commands.left()) == 3
    assert commands.left() == []
    addresses = [text.split()[5] for text in commands.run if "address add" in text]
    assert addresses == ["10.213.77.1/24", "10.213.77.2/24"]
    # Every command but those on namespaces themselves is within one.
    assert all(text.startswith(("ip netns ", f"ip -n hydra-dist-{os.getpid()}-")) for text in commands.run)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_hosts_are_removed_when_the_block_fails(monkeypatch, error):
    commands = Commands(monkeypatch)

    def fails_inside():
        with slow_link.hosts(2):
            raise error

    with pytest.raises(error):
        fails_inside()
    assert commands.left() == []


@pytest.mark.parametrize("fails", ["type veth", "type bridge", "-1"])
def test_what_was_made_before_a_failure_is_removed(monkeypatch, fails):
    commands = Commands(monkeypatch, fails)
    with pytest.raises(RunError, match="Operation not permitted"), slow_link.hosts(2):
        pass
    made = [name for name in commands.left() if fails not in name]
    assert made == []


def test_what_cannot_be_removed_is_told(monkeypatch):
    Commands(monkeypatch, "netns delete")
    with (
        pytest.raises(RunError, match=r"could not be removed: ip netns delete hydra-dist-\d+-switch, "),
        slow_link.hosts(1),
    ):
        pass


def test_what_killed_runs_left_is_removed(monkeypatch):
    alive = f"hydra-dist-{os.getpid()}-0"
    commands = Commands(
        monkeypatch, namespaces=f"hydra-dist-99999999-0 (id: 1)\nmine\n{alive}\nhydra-dist-99999999-switch\n"
    )
    slow_link._remove_orphans()
    assert commands.run[1:] == [f"ip netns delete hydra-dist-99999999-{which}" for which in ("0", "switch")]


def test_this_machine_has_such_links_or_says_why_not():
    """Whatever this machine allows, nothing is left behind."""
    before = _namespaces()
    reason = slow_link.left_out()
    assert reason is None or len(reason) > 10
    assert _namespaces() == before


def _namespaces():
    try:
        return sorted(slow_link._ip("netns", "list").splitlines())
    except RunError:
        return []


def test_without_such_links_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(slow_link.shutil, "which", lambda name: None)
    with pytest.raises(RunError, match=r"overlap: iproute2 \(ip and tc\) is not installed"):
        overlap.run(Options(device="cpu", settings=overlap.SETTINGS))
    monkeypatch.setattr(slow_link.shutil, "which", lambda name: name)
    Commands(monkeypatch, "netns add")
    with pytest.raises(RunError, match=r"network namespaces cannot be made: .*Operation not permitted"):
        overlap.run(Options(device="cpu", settings=overlap.SETTINGS))
    with pytest.raises(RunError, match="without --gpu"):
        overlap.run(Options(device="cuda", settings=overlap.SETTINGS))


def test_cases_are_those_of_the_settings():
    assert overlap._kinds(overlap.SETTINGS) == [("computed", 2), ("slept", 2), ("slept", 4)]
    assert overlap._kinds({**overlap.SETTINGS, "computed_ranks": ""}) == [("slept", 2), ("slept", 4)]
