"""The small piece of work by which a backend is tried: what it catches, and when it is done."""

import sys
import threading
from importlib import import_module
from types import ModuleType

import pytest
import torch

from hydra_dist.attention import Mask, probe
from hydra_dist.attention.launch import Need
from hydra_dist.attention.probe import Where

module = import_module("hydra_dist.attention.backends")  # the package has a function of that name
SQUARE, WINDOW = Need("square"), Need("window", True, False)


def where(dtype=torch.float32, head_dim=16, group=2):
    return Where(torch.device("cpu"), dtype, head_dim, group)


def choose(name="auto", place=None, need=SQUARE):
    return module.choose(name, place or where(), need)


@pytest.mark.parametrize("broken", ["out", "lse", "dq", "dk", "dv", "nan", "shape", "exception"])
def test_each_result_is_compared(like_a_gpu, install, monkeypatch, packages, broken):
    install("flash_attention_2")
    whole = packages["flash_attention_2"]

    def spoiled(name, x):
        if broken == "shape" and name == "lse":
            return x.transpose(1, 2)
        return x + torch.nan if broken == "nan" and name == "dv" else x * (1.1 if name == broken else 1.0)

    def forward(q, k, v, launch):
        if broken == "exception":
            raise RuntimeError("no kernel image\nis available")
        return tuple(spoiled(n, x) for n, x in zip(("out", "lse"), whole.forward(q, k, v, launch), strict=True))

    def backward(*arguments):
        return tuple(spoiled(n, x) for n, x in zip(("dq", "dk", "dv"), whole.backward(*arguments), strict=True))

    for form in ("tile", "edge", "documents"):
        assert probe.failure("right", whole.forward, whole.backward, where(), form) is None
        reason = probe.failure("wrong", forward, backward, where(), form)
        expected = {
            "nan": "dv is off by nan",
            "shape": "lse has the shape",
            "exception": "RuntimeError: no kernel image",
        }
        assert expected.get(broken, f"{broken} is off by 0.1") in reason


def test_any_mask_is_tried(like_a_gpu):
    plain = module._BACKENDS["reference"]
    assert probe.failure("right", plain.forward, plain.backward, where(), "any") is None

    def without_positions(q, k, v, launch):
        mask = Mask(launch.mask.causal, launch.mask.window)
        return plain.forward(q, k, v, launch.__class__(launch.scale, mask=mask))

    assert "lse is -inf elsewhere" in probe.failure("wrong", without_positions, plain.backward, where(), "any")


def test_one_try_for_each_place_and_form(like_a_gpu, install, monkeypatch):
    kernel = install("flash_attention_4")
    threads = [threading.Thread(target=choose) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    once = len(kernel.calls)
    assert once == 4  # two masks, forward and backward
    for place in (where(), where(head_dim=15), where(head_dim=9)):
        choose(place=place)
    assert len(kernel.calls) == once  # padded to 16 all the same
    for count, place in enumerate((where(head_dim=17), where(group=4), where(torch.float16)), start=2):
        choose(place=place)
        assert len(kernel.calls) == count * once
    choose(need=WINDOW)
    assert len(kernel.calls) == 5 * once


def test_running_out_of_memory_is_no_verdict(like_a_gpu, install, monkeypatch):
    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    kernel = install("flash_attention_4")
    right = kernel.forward
    kernel.forward = out_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        choose()
    kernel.forward = right
    assert choose().backend.name == "flash_attention_4"


def test_trying_leaves_random_numbers_alone(like_a_gpu, install):
    install("flash_attention_4")
    before = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        assert choose().backend.name == "flash_attention_4"
    assert torch.equal(torch.get_rng_state(), before)


def test_other_arguments_than_expected(like_a_gpu, monkeypatch):
    """A version that takes the window as one pair, and one that lacks the function."""
    package = ModuleType("flash_attn_interface")
    package._flash_attn_forward = lambda q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1): None
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    why = choose().why
    assert "not flash_attention_3 (its small piece of work with all pairs went wrong: TypeError: " in why
    assert "unexpected keyword argument 'window_size_left'" in why
    del package._flash_attn_forward
    probe.forget()
    assert "AttributeError: module 'flash_attn_interface' has no attribute" in choose().why


def test_nothing_is_tried_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run it once before the capture"):
        probe.failure("it", None, None, where()._replace(device=torch.device("cuda")), "tile")
