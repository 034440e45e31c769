"""The allocator's model: live bytes, holes, growth, streams; and a plain loss as the case that shows why."""

import pytest

from hydra_dist.memory.deepspeed_hf_allocator import PAGE, Allocator

MIB = 2**20


def test_live_bytes_are_counted_by_component_and_phase():
    memory = Allocator()
    memory.phase("forward")
    memory.allocate("a", 3 * MIB, "activations")
    memory.allocate("b", 2 * MIB, "logits")
    memory.free("b")
    memory.phase("backward")
    memory.allocate("c", MIB, "gradients")
    assert memory.peaks["forward"].parts == {"activations": 3 * MIB, "logits": 2 * MIB}
    assert memory.peaks["backward"].total == memory.total == 4 * MIB


def test_a_hole_takes_what_fits_and_neighbours_join():
    memory = Allocator()
    for name in "abcd":
        memory.allocate(name, PAGE, "x")
    memory.free("a", "b")
    memory.allocate("both", 2 * PAGE, "x")
    assert memory.reserved == 4 * PAGE
    memory.free("both", "d")
    memory.allocate("longer", 3 * PAGE, "x")  # fits neither hole nor what is left of the end
    assert memory.reserved == 6 * PAGE


def test_the_smallest_hole_that_fits_is_taken():
    memory = Allocator()
    for name, pages in (("wide", 3), ("between", 1), ("narrow", 1), ("last", 1)):
        memory.allocate(name, pages * PAGE, "x")
    memory.free("wide", "narrow")
    memory.allocate("one", PAGE, "x")
    memory.allocate("three", 3 * PAGE, "x")
    assert memory.reserved == 6 * PAGE


def test_streams_share_no_memory():
    memory = Allocator()
    memory.allocate("a", PAGE, "x")
    memory.free("a")
    memory.allocate("b", PAGE, "x", stream="gather")
    assert memory.reserved == 2 * PAGE
    assert memory.peaks[""].total == PAGE


def test_what_another_stream_reads_waits_for_the_host_to_synchronize():
    memory = Allocator()
    memory.allocate("send", PAGE, "x")
    memory.free("send", late=True)
    assert memory.total == 0
    memory.allocate("next", PAGE, "x")
    assert memory.reserved == 2 * PAGE
    memory.synchronize()
    memory.allocate("after", PAGE, "x")
    assert memory.reserved == 2 * PAGE


def test_names_are_unique_and_renaming_moves_the_component():
    memory = Allocator()
    memory.allocate("a", MIB, "x")
    with pytest.raises(ValueError, match="a is allocated twice"):
        memory.allocate("a", MIB, "x")
    memory.rename("a", "b", "y")
    assert memory.live == {"x": 0, "y": MIB}
    memory.allocate("a", MIB, "x")
    with pytest.raises(ValueError, match="b is there already"):
        memory.rename("a", "b")
    assert memory.holds("a")


def test_a_plain_loss_allocates_12_bytes_a_logit_and_reserves_14():
    memory, unit = Allocator(), PAGE
    for name, size in (("bf16", 2), ("fp32", 4), ("log softmax", 4)):
        memory.allocate(name, size * unit, "loss")
    memory.free("fp32", "bf16")
    memory.allocate("its gradient", 4 * unit, "loss")
    memory.allocate("gradient", 4 * unit, "loss")
    assert memory.total == 12 * unit
    assert memory.reserved == 14 * unit
