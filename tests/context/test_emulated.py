"""Emulated ranks: what arrives, what is counted, and how a rank that hangs, fails or misuses a buffer is reported."""

import time

import pytest
import torch

from hydra_dist.context import ContextParallel, Traffic, TransportTimeoutError, run_ranks
from hydra_dist.context.transport import OneRank
from hydra_dist.errors import ConfigError

LABELS = {"direction": "forward", "kind": "test"}


def test_results_come_in_the_order_of_the_ranks():
    assert run_ranks(3, lambda mesh: (mesh.rank, mesh.size, mesh.shape)) == [
        (0, 3, (3, 1)),
        (1, 3, (3, 1)),
        (2, 3, (3, 1)),
    ]


def test_messages_between_two_ranks_keep_their_order():
    def rotate(mesh):
        ring = mesh.ring
        first, second = torch.empty(4), torch.empty(4)
        works = [
            ring.exchange(
                [(ring.next_rank, torch.full((4,), 10.0 * turn + ring.rank))], [(ring.previous_rank, into)], **LABELS
            )
            for turn, into in enumerate((first, second))
        ]
        for work in works:
            work.wait()
        return first[0].item(), second[0].item()

    assert run_ranks(3, rotate) == [(2.0, 12.0), (0.0, 10.0), (1.0, 11.0)]


def test_what_is_sent_is_what_the_tensor_held_when_it_was_sent():
    def one(mesh):
        ring = mesh.ring
        mine, other = torch.full((2,), float(ring.rank)), torch.empty(2)
        ring.exchange([(ring.next_rank, mine)], [(ring.next_rank, other)], **LABELS).wait()
        mine.fill_(-1)
        return other[0].item()

    assert run_ranks(2, one) == [1.0, 0.0]


def test_collectives():
    def collect(mesh):
        ring, rank = mesh.ring, mesh.rank
        lengths = [1, 2, 3]
        mine = torch.arange(lengths[rank]) + 10 * rank
        gathered = [torch.empty(length, dtype=torch.int64) for length in lengths]
        ring.all_gather(gathered, mine, **LABELS).wait()
        scattered = torch.empty(lengths[rank], dtype=torch.int64)
        ring.reduce_scatter(scattered, gathered, **LABELS).wait()
        total = mine.sum().reshape(1)
        ring.all_reduce(total, **LABELS).wait()
        outputs = [torch.empty(lengths[rank], dtype=torch.int64) for _ in lengths]
        ring.all_to_all(outputs, [part + rank for part in gathered], **LABELS).wait()
        return (
            [part.tolist() for part in gathered],
            scattered.tolist(),
            total.item(),
            [part.tolist() for part in outputs],
            ring.traffic.stats()["forward"],
        )

    results = run_ranks(3, collect)
    whole = [[0], [10, 11], [20, 21, 22]]
    for rank, (gathered, scattered, total, outputs, sent) in enumerate(results):
        assert gathered == whole
        assert scattered == [3 * x for x in whole[rank]]
        assert total == 84
        assert outputs == [[x + source for x in whole[rank]] for source in range(3)]
        length = rank + 1
        # gather + scatter + reduce (4 messages of a third of 8 bytes, rounded up) + all-to-all
        assert sent["bytes"] == 8 * (2 * length + (6 - length) + (6 - length)) + 4 * 3
        assert sent["messages"] == 2 + 2 + 4 + 2
        assert sent["hops"] == 4


def test_a_grid_has_rings_and_ulysses_groups_of_its_own():
    def sums(mesh):
        ring, ulysses = torch.tensor([mesh.rank]), torch.tensor([mesh.rank])
        mesh.ring.all_reduce(ring, **LABELS).wait()
        mesh.ulysses.all_reduce(ulysses, **LABELS).wait()
        return mesh.ring.rank, mesh.ulysses.rank, ring.item(), ulysses.item()

    assert run_ranks((3, 2), sums) == [
        (0, 0, 6, 1),
        (0, 1, 9, 1),
        (1, 0, 6, 5),
        (1, 1, 9, 5),
        (2, 0, 6, 9),
        (2, 1, 9, 9),
    ]


def test_a_plan_counts_its_own_and_adds_to_the_whole():
    whole = Traffic()
    part = Traffic(parent=whole)
    part.add("forward", "keys", 8, 1)
    whole.add("backward", "halo", 4, 1)
    assert part.stats()["forward"] == {
        "bytes": 8,
        "messages": 1,
        "hops": 1,
        "kinds": {"keys": {"bytes": 8, "messages": 1, "hops": 1}},
    }
    assert whole.stats()["forward"]["bytes"] == 8
    assert (part.stats()["backward"]["bytes"], whole.stats()["backward"]["bytes"]) == (0, 4)


def test_a_rank_that_waits_for_nothing_names_itself_and_its_peer():
    def one_is_silent(mesh):
        if mesh.rank == 0:
            mesh.ring.exchange([], [(1, torch.empty(1))], **LABELS).wait()

    begin = time.monotonic()
    with pytest.raises(
        TransportTimeoutError, match=r"ring rank 0 waited 0.2 s for emulated ring rank 1 \(forward test\)"
    ):
        run_ranks(2, one_is_silent, timeout=0.2)
    assert time.monotonic() - begin < 5


def test_two_ranks_that_wait_for_each_other_do_not_hang():
    def both_receive(mesh):
        mesh.ring.exchange([], [(mesh.ring.next_rank, torch.empty(1))], **LABELS).wait()

    with pytest.raises(TransportTimeoutError):
        run_ranks(2, both_receive, timeout=0.2)


def test_a_failing_rank_is_named_and_the_others_are_released():
    def fails(mesh):
        if mesh.rank == 2:
            raise KeyError("lost")
        mesh.ring.exchange([], [(2, torch.empty(1))], **LABELS).wait()

    begin = time.monotonic()
    with pytest.raises(KeyError, match="lost") as caught:
        run_ranks(4, fails, timeout=60)
    assert caught.value.__notes__ == ["raised by emulated rank 2 of 4"]
    assert time.monotonic() - begin < 10


def test_a_message_that_nobody_receives_is_an_error():
    def send_only(mesh):
        if mesh.rank == 1:
            mesh.ring.exchange([(0, torch.zeros(3))], [], **LABELS).wait()

    with pytest.raises(RuntimeError, match=r"1 message\(s\) from emulated ring rank 1 to emulated ring rank 0"):
        run_ranks(2, send_only)


def test_a_message_of_another_size_or_dtype_is_an_error():
    for message in (torch.zeros(3), torch.zeros(2).double()):

        def mismatch(mesh, message=message):
            ring = mesh.ring
            ring.exchange([(ring.next_rank, message)], [(ring.next_rank, torch.empty(2))], **LABELS).wait()

        with pytest.raises(RuntimeError, match=r"expected 2 x torch\.float32 from rank"):
            run_ranks(2, mismatch)


def test_a_buffer_that_is_changed_under_way_is_an_error_and_its_neighbour_is_not():
    def change(mesh, inside):
        ring = mesh.ring
        buffer, other = torch.zeros(4), torch.empty(2)
        work = ring.exchange([(ring.next_rank, buffer[:2])], [(ring.next_rank, other)], **LABELS)
        buffer[0 if inside else 2] = 1
        work.wait()

    run_ranks(2, lambda mesh: change(mesh, inside=False))
    with pytest.raises(RuntimeError, match="changed while it was under way"):
        run_ranks(2, lambda mesh: change(mesh, inside=True))


@pytest.mark.parametrize(
    "tensors,reason",
    [
        (lambda: ([(0, torch.zeros(1))], []), "cannot exchange with rank 0"),
        (lambda: ([(5, torch.zeros(1))], []), "cannot exchange with rank 5"),
        (lambda: ([], [(1, torch.zeros(4, 4).t()[:2])]), "not contiguous"),
    ],
)
def test_impossible_exchanges_are_refused(tensors, reason):
    def misuse(mesh):
        if mesh.rank == 0:
            mesh.ring.exchange(*tensors(), **LABELS)

    with pytest.raises(ValueError, match=reason):
        run_ranks(2, misuse)


def test_collectives_check_their_tensors():
    def misuse(mesh):
        mesh.ring.all_gather([torch.zeros(1)], torch.zeros(1), **LABELS)

    with pytest.raises(ValueError, match="takes 3"):
        run_ranks(2, misuse)
    with pytest.raises(ValueError, match="one collective over"):
        run_ranks(1, lambda mesh: mesh.ring.all_gather([torch.zeros(1)], torch.zeros(1).double(), **LABELS))


@pytest.mark.parametrize("ranks", [0, (2, 0), (1, 2, 3)])
def test_a_run_needs_ranks(ranks):
    with pytest.raises(ConfigError, match="run_ranks"):
        run_ranks(ranks, lambda mesh: None)


def test_ranks_inherit_grad_mode_and_autocast_and_keep_to_one_thread_each():
    threads = torch.get_num_threads()

    def modes(mesh):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        return torch.is_grad_enabled(), product.dtype, torch.get_num_threads()

    assert run_ranks(2, modes) == [(True, torch.float32, 1)] * 2
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert run_ranks(2, modes) == [(False, torch.bfloat16, 1)] * 2
    assert torch.get_num_threads() == threads


def test_one_rank_copies_and_sends_nothing():
    one = OneRank(torch.device("cpu"))
    into = torch.empty(2)
    one.all_gather([into], torch.ones(2), **LABELS).wait()
    one.all_to_all([into], [2 * torch.ones(2)], **LABELS).wait()
    one.reduce_scatter(into, [3 * into], **LABELS).wait()
    one.all_reduce(into, **LABELS).wait()
    one.exchange([], [], **LABELS).wait()
    assert into.tolist() == [6, 6]
    assert one.traffic.stats()["forward"]["bytes"] == 0


def test_the_shorter_timeout_holds():
    def wait(mesh):
        ContextParallel(mesh, timeout=0.2)
        if mesh.rank == 0:
            mesh.ring.exchange([], [(1, torch.empty(1))], **LABELS).wait()

    with pytest.raises(TransportTimeoutError, match=r"waited 0\.2 s"):
        run_ranks(2, wait, timeout=60)
