"""Which implementation is taken, and what is said where none can be."""

import sys
from importlib import import_module

import pytest
import torch

from hydra_dist.attention import Mask, attend_tiles, attention, backends, explain, probe
from hydra_dist.attention.launch import Need
from hydra_dist.attention.probe import Where
from hydra_dist.costs.tiles import Span, tiles
from hydra_dist.errors import ConfigError

module = import_module("hydra_dist.attention.backends")  # the package has a function of that name
CPU, META = torch.device("cpu"), torch.device("meta")
SQUARE, RECTANGLE = Need("square"), Need("rectangle")
WINDOW, DOCUMENTS = Need("window", True, False), Need("documents", False, False)
ANY, SPANS, TILES = Need("any", True, False), Need("any", False, True, 4), Need(None, True)
SCATTERED = Need("any", False, True, module.LARGEST_SPAN_PAIRS + 1)


def where(dtype=torch.float32, device=CPU, head_dim=16, group=2):
    return Where(device, dtype, head_dim, group)


def choose(name="auto", place=None, need=SQUARE):
    return module.choose(name, place or where(), need)


def test_names():
    assert backends() == (
        "flash_attention_4",
        "flash_attention_3",
        "cudnn",
        "flash_attention_2",
        "flash",
        "triton",
        "reference",
    )
    assert all(choose(name).backend.name == name for name in ("flash", "reference"))


@pytest.mark.parametrize("need", [SQUARE, RECTANGLE, WINDOW, DOCUMENTS, ANY, SPANS, TILES])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_cpu_takes_flash_in_tiles_and_tries_nothing(monkeypatch, need, dtype):
    monkeypatch.setattr(probe, "failure", None)
    monkeypatch.setitem(sys.modules, "triton", None)
    chosen, form, why = choose(place=where(dtype), need=need)
    assert (chosen.name, form) == ("flash", None)
    assert why == f"the first that takes {dtype} on cpu"


def test_auto_says_what_it_passed_over():
    chosen, form, why = choose(place=where(device=META))
    assert (chosen.name, form) == ("reference", "any")
    assert "not flash (PyTorch has no flash operator" in why
    chosen, form, why = choose(need=SCATTERED)
    assert (chosen.name, form) == ("reference", "any")
    assert "scattered" in why
    assert choose(need=SCATTERED._replace(num_span_pairs=module.LARGEST_SPAN_PAIRS)).backend.name == "flash"


def test_what_is_asked_for_is_not_replaced():
    assert choose("flash", need=SCATTERED).backend.name == "flash"
    with pytest.raises(ConfigError, match=r'"flash" cannot be used here: .* meta; reference works'):
        choose("flash", where(device=META))
    with pytest.raises(
        ConfigError, match=r'"flash_attention_3" cannot be used here: .*CUDA.*; flash or reference works'
    ):
        choose("flash_attention_3")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Flash", '"flash"'),
        ("referense", '"reference"'),
        ("automatic", '"auto"'),
        ("flash_attn_3", '"flash_attention_3"'),
    ],
)
def test_unknown_names(name, hint):
    with pytest.raises(ConfigError, match=f"known are auto, flash_attention_4, .*, reference.*{hint}"):
        choose(name)


def test_dtypes_that_nothing_takes():
    with pytest.raises(ConfigError, match="no attention backend takes this"):
        choose(place=where(torch.float8_e4m3fn))
    with pytest.raises(ConfigError, match="cannot be used here"):
        choose("reference", where(torch.int32))


@pytest.mark.parametrize(
    ("major", "expected"),
    [
        (7, ["flash", "triton", "reference"]),
        (8, ["flash_attention_2", "flash", "cudnn", "triton", "reference"]),
        (9, ["flash_attention_4", "flash_attention_3", "cudnn", "flash_attention_2", "flash", "triton", "reference"]),
        (10, ["flash_attention_4", "cudnn", "flash_attention_2", "flash", "triton", "reference"]),
        (12, ["flash_attention_4", "cudnn", "flash_attention_2", "flash", "triton", "reference"]),
        (13, ["flash_attention_4", "cudnn", "flash_attention_2", "flash", "triton", "reference"]),
    ],
)
def test_orders(monkeypatch, major, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
    assert list(module.order(torch.device("cuda"))) == expected


@pytest.mark.parametrize(
    ("major", "installed", "expected"),
    [
        (9, ["flash_attention_2", "flash_attention_3", "flash_attention_4"], "flash_attention_4"),
        (9, ["flash_attention_2", "flash_attention_3"], "flash_attention_3"),
        (9, ["flash_attention_2"], "flash_attention_2"),
        (10, ["flash_attention_2", "flash_attention_3"], "flash_attention_2"),
        (8, ["flash_attention_2", "flash_attention_4"], "flash_attention_2"),
        (7, ["flash_attention_2"], "flash"),
    ],
)
def test_the_first_that_works(like_a_gpu, install, major, installed, expected):
    like_a_gpu(major)
    kernels = {name: install(name) for name in installed}
    chosen, form, why = choose()
    assert chosen.name == expected
    assert form == (None if expected == "flash" else "square")
    for name in module.order(CPU)[: module.order(CPU).index(expected)]:
        assert f"not {name} (" in why
        if name.startswith("flash_attention"):
            assert "cannot be imported: No module named" in why
    assert all(bool(kernels[name].calls) == (name == expected) for name in installed)


def test_wrong_numbers_are_refused(like_a_gpu, install):
    install("flash_attention_4").scale_error = 1.05
    install("flash_attention_3")
    chosen, _, why = choose()
    assert chosen.name == "flash_attention_3"
    assert "not flash_attention_4 (its small piece of work with all pairs" in why
    assert "lse is off by" in why
    with pytest.raises(
        ConfigError, match=r'"flash_attention_4" cannot be used here: .* lse is off by .*; flash_attention_3'
    ):
        choose("flash_attention_4")


@pytest.mark.parametrize(
    ("need", "form"),
    [
        (SQUARE, "square"),
        (RECTANGLE, "rectangle"),
        (WINDOW, "window"),
        (DOCUMENTS, "documents"),
        (SPANS, None),
        (TILES, None),
        (ANY, None),
    ],
)
def test_forms_of_masks(like_a_gpu, install, need, form):
    install("flash_attention_4")
    chosen, found, _ = choose(need=need)
    assert (chosen.name, found) == ("flash_attention_4", form)


def test_a_mask_as_a_whole_comes_before_many_tiles(like_a_gpu, install, monkeypatch):
    """What comes first in the order but would need many tiles gives way to what comes later and needs one launch."""
    plain = module._BACKENDS["reference"]
    kernels = module.Backend("triton", "", lambda *_: None, plain.forward, plain.backward, general=True)
    monkeypatch.setitem(module._BACKENDS, "triton", kernels)
    install("flash_attention_4")
    chosen, form, why = choose(need=ANY)
    assert (chosen.name, form) == ("triton", "any")
    assert "not flash_attention_4 (FlashAttention 4 takes no positions" in why
    assert choose(need=SPANS).backend.name == "flash_attention_4"
    assert choose(need=WINDOW).backend.name == "flash_attention_4"
    assert choose(need=SCATTERED)[:2] == (kernels, "any")


LENGTH = 97
STARTS = torch.tensor([0, 1, 41, 42, 43, 73]).repeat_interleave(torch.tensor([1, 40, 1, 1, 30, 24]))[None]


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
@pytest.mark.parametrize(
    "mask",
    [
        Mask(),
        Mask(causal=False),
        Mask(window=5),
        Mask(document_starts=STARTS),
        Mask(window=9, document_starts=STARTS.expand(2, -1)),
        Mask(q_positions=torch.arange(50, 50 + LENGTH)),
    ],
    ids=["causal", "full", "window", "documents", "documents, window", "later queries"],
)
def test_attention_through_a_package(like_a_gpu, install, inputs, difference, name, mask):
    kernel = install(name)
    tensors = inputs(q_length=LENGTH, dtype=torch.float32)
    assert f"backend {name} " in explain(*tensors[:2], mask)
    kernel.calls.clear()
    results = []
    for backend in ("auto", name, "reference"):
        leaves = [x.clone().requires_grad_() for x in tensors[:3]]
        out, lse = attention(*leaves, mask, backend=backend)
        results.append((out, lse, *torch.autograd.grad(out, leaves, tensors[3])))
    for a, b, exact in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert difference(a, exact) < 1e-5
    launches = 1 if mask.q_positions is None else 3  # the keys before the first query, a square, queries after it
    assert kernel.calls == (["forward"] * launches + ["backward"] * launches) * 2


def test_tiles_through_a_package(like_a_gpu, install, inputs, difference):
    """Partial results over the keys of another rank, along a window's edge."""
    kernel = install("flash_attention_4")
    q, k, v, _ = inputs(1, 90, 60, dtype=torch.float32)
    spans = (Span(0, 90, 30),), (Span(0, 60, 0),)
    found = tiles(*spans, causal=True, window=70, documents=None)
    out, lse = torch.zeros(q.shape), torch.full((1, 4, 90), -torch.inf)
    attend_tiles(q, k, v, found, scale=0.25, out=out, lse=lse)
    mask = Mask(window=70, q_positions=torch.arange(30, 120))
    exact, exact_lse = attention(q, k, v, mask, scale=0.25, backend="reference")
    assert difference(out, exact) < 1e-5
    assert torch.equal(lse == -torch.inf, exact_lse == -torch.inf)
    assert any(tile.kind == "masked" for tile in found)
    assert kernel.calls.count("forward") == len(found) + 3  # and what was tried: two tiles and an edge


def test_nothing_is_tried_while_a_compiler_traces(like_a_gpu, install, inputs):
    kernel = install("flash_attention_4")
    seen = []

    def look(graph, _):
        seen.append(list(kernel.calls))
        return graph.forward

    q, k, v, _ = inputs(1, 20, dtype=torch.float32)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, mask=Mask(window=6))[0], backend=look, fullgraph=True)
    out = compiled(q, k, v)
    assert seen == [[]]
    assert "forward" in kernel.calls
    assert torch.equal(out, attention(q, k, v, Mask(window=6))[0])


def test_the_reference_is_what_it_says_under_autocast(inputs):
    q, k, v, _ = (x.float() for x in inputs(1, 20))
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attention(q, k, v, backend="reference")
    assert torch.equal(out, attention(q, k, v, backend="reference")[0])
