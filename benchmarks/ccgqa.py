"""CCGQA on a GPU: its prologue runs near memory speed, and its layer beats multi-head attention of the same width.

Compared in turns, in bf16, as CUDA graphs. The prologue (everything between the projection and attention) is held
against the bytes it has to move, each read or written once, at the data sheet's bandwidth, and against a chain of
PyTorch's own operators. Layers are held against multi-head attention: at a long sequence with the fastest attention
that each side has here, and at short ones against FlashAttention-2, whose activation memory is compared as well.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import attention_peers as peers
from benchmarks import ccgqa_tune
from benchmarks.ccgqa_chain import eager_chain
from benchmarks.gpu_rows import COLUMNS, Measurement, Row
from benchmarks.gpu_timing import Backward, Captured, copy_of, forward_and_backward
from benchmarks.harness import Options
from benchmarks.result import Result, Samples, Setting, Table
from hydra_dist.errors import RunError
from hydra_dist.model import CCGQA, GQA
from hydra_dist.model.prologue import Prologue
from hydra_dist.model.prologue_operator import prologue
from hydra_dist.model.rope import Rope

NEEDS_GPU = True
GPU_ROWS = {
    "prologue against the bytes it moves": "one H100 or H200",
    "prologue against a chain of PyTorch's operators": "one H100 or H200",
    "layers against multi-head attention, 16,384 tokens": "one H100 or H200",
    "small layers against FlashAttention-2": "one H100 or H200",
}
SETTINGS: dict[str, Setting] = {
    "dtype": "bfloat16",
    "prologue_backend": "triton",
    "hidden_size": 2048,
    "head_dim": 128,
    "heads": "8/2",
    "prologue_tokens": 32768,
    "layer_heads": "4/4,8/2",
    "layer_tokens": 16384,
    "small_hidden_size": 512,
    "small_head_dim": 64,
    "small_heads": "2/1",
    "small_batch": 4,
    "small_tokens": "512,1024",
    "copy_bytes": 2**31,
    "matmul_size": 8192,
    "rounds": 20,
    "repeats": 20,
    "tune": False,
}
"""``repeats``: calls in one CUDA graph; of a layer at ``layer_tokens`` a tenth as many. ``tune``: time the kernels of
the prologue with other tiles as well."""

FORWARD_BAR, BACKWARD_BAR, CHAIN_BAR, SMALL_BAR, KEPT_BAR = 1.3, 1.6, 5.0, 1.0, 3.0
LAYER_BARS = {"4/4": (3.0, 2.5), "8/2": (1.7, 1.6)}
"""Speed-up of forward and backward over multi-head attention, by query/key heads; other heads are only shown."""
INPUT_SETS = 2
"""Taken in turns, so that a call does not find in the cache what the one before it left."""
LARGEST_DIFFERENCE = 5e-2
"""Of the operator from the chain, relative, root mean square: both round to bf16 in several places."""
GPUS = ("H100", "H200")
"""A row is measured where one of these ran it with the shapes above."""
NOT_SHAPES = ("copy_bytes", "matmul_size", "rounds", "repeats", "tune")
UNROTATED = "MHA without rotation"
"""The peer with nothing between its projection and its attention: shown beside it, not judged."""


def run(options: Options) -> Result:
    """Measure everything in the table."""
    found = Measurement(options)
    found.say(found.limits.text)
    layer = _ccgqa(found, "", str(options.settings["heads"]))
    prologue_rows(found, layer)
    for heads in str(options.settings["layer_heads"]).split(","):
        layer_rows(found, heads)
    for length in map(int, str(options.settings["small_tokens"]).split(",")):
        small_row(found, length)
    kept_rows(found)
    if options.settings["tune"]:
        found.quantities |= ccgqa_tune.sweep(layer.prologue, _inputs(found, layer), found.rounds, found.say)
    judged = [row for row in found.rows if row.bar is not None]
    missed = [f"{row.what} ({row.median:.3g})" for row in judged if not row.holds]
    return Result(
        holds=not missed,
        finding=f"{len(judged) - len(missed)} of {len(judged)} bars are met"
        + (f"; not {', '.join(missed)}" if missed else "")
        + f"; {found.limits.text}",
        quantities=found.quantities,
        counts=found.counts,
        table=Table(columns=COLUMNS, rows=tuple(row.cells() for row in found.rows)),
        rows=tuple(GPU_ROWS) if as_stated(options, found.limits.name) else (),
    )


def as_stated(options: Options, device_name: str) -> bool:
    """Whether the shapes and the GPU are those that the rows name."""
    same = all(options.settings[key] == value for key, value in SETTINGS.items() if key not in NOT_SHAPES)
    return same and any(name in device_name.split() for name in GPUS)


def prologue_rows(found: Measurement, layer: CCGQA) -> None:
    """The prologue against its bytes and against the chain."""
    module, inputs = layer.prologue, _inputs(found, layer)
    rope = peers.rope_of(layer, inputs[0].shape[1], found.device)
    parameters = list(module.parameters())
    fused = [_of(_fused, module, p, rope) for p in inputs]
    chain = [_of(eager_chain, module, p, rope) for p in inputs]
    _check_equal(fused[0], chain[0], [inputs[0], *parameters])
    num_bytes = _over_bytes(found, module, inputs, rope)

    what = "eager chain over prologue, forward and backward"
    work = {}
    for name, functions in (("fused", fused), ("eager chain", chain)):
        steps = [forward_and_backward(f, [p, *parameters]) for f, p in zip(functions, inputs, strict=True)]
        work[name] = Captured(steps, found.device, found.repeats)
    seconds, ratios = found.compare(what, work)
    time = seconds["fused"].median
    speed = _bytes_a_second(found, num_bytes, time)
    found.add(Row(what, ratios["eager chain"], CHAIN_BAR, False, time, seconds["eager chain"].median, *speed))


def _over_bytes(found: Measurement, module: Prologue, inputs: Sequence[Tensor], rope: Rope | None) -> int:
    """The operator alone, forward and backward apart, over the time that its bytes take and over a copy of as many.

    Returns the bytes of both.
    """
    taps, beta = module.taps, module.beta()
    assert taps is not None
    assert beta is not None
    beta = beta.detach().requires_grad_()
    weights = [taps.w0, taps.b0, taps.w1, taps.b1, beta]

    def operator(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return prologue(p, None, None, None, [p.shape[1]], taps, beta, rope, module.switches, module.backend)

    functions = [_of(operator, p) for p in inputs]
    latent, width = module.switches.latent_size, inputs[0].shape[-1]
    size = inputs[0].shape[1] * inputs[0].element_size()
    # Forward reads the projection and writes q, k, v. Backward reads z and the gradients of q, k, v and writes the
    # projection's; what an implementation reads or writes besides is its own affair.
    num_bytes = {"forward": 2 * width * size, "backward": (latent + 2 * width) * size}
    steps: dict[str, list[Callable[[], object]]] = {
        "forward": [_inference(function) for function in functions],
        "backward": [Backward(function, [p, *weights]) for function, p in zip(functions, inputs, strict=True)],
    }
    for name, bar in (("forward", FORWARD_BAR), ("backward", BACKWARD_BAR)):
        what, moved = f"prologue, {name}, over the time of its bytes", num_bytes[name]
        copies = [copy_of(moved, found.device) for _ in inputs]
        work = {kind: Captured(calls, found.device, found.repeats) for kind, calls in
                (("copy", copies), ("fused", steps[name]))}  # fmt: skip
        seconds, ratios = found.compare(what, work)
        found.counts[f"{what}, bytes"] = moved
        floor = moved / found.limits.bandwidth
        ratio = Samples.of([taken / floor for taken in seconds["fused"].raw], "1")
        time = seconds["fused"].median
        speed = _bytes_a_second(found, moved, time)
        found.add(Row(what, ratio, bar, True, time, floor, *speed))
        what = f"prologue, {name}, over a copy of as many bytes"
        found.add(Row(what, ratios["fused"], None, True, time, seconds["copy"].median, *speed))
    return sum(num_bytes.values())


def _bytes_a_second(found: Measurement, num_bytes: int, seconds: float) -> tuple[str, float]:
    """In words, and as a share of the chip's."""
    return f"{num_bytes / seconds / 1e9:,.0f} GB/s", num_bytes / seconds / found.limits.bandwidth


def layer_rows(found: Measurement, heads: str) -> None:
    """A layer and multi-head attention at a long sequence, forward and backward apart."""
    layers, length = _layers(found, "", heads), int(found.settings["layer_tokens"])
    x = found.random(1, length, int(found.settings["hidden_size"]))
    functions = {}
    for name, layer in layers.items():
        attend = peers.ours(found.fastest_attention(layer, length))
        functions[name] = _step(layer, x, attend)
    repeats, bars = max(1, found.repeats // 10), LAYER_BARS.get(heads, (None, None))
    flops = peers.layer_flops(layers["CCGQA"], length)
    for index, direction in enumerate(("forward", "backward")):
        what = f"MHA over CCGQA, {heads} heads of {layers['CCGQA'].head_dim}, {length:,} tokens, {direction}"
        work = {}
        for name, layer in layers.items():
            step = functions[name] if index == 0 else Backward(functions[name], [x, *layer.parameters()])
            work[name] = Captured([step], found.device, repeats)
        _add_layer(found, what, work, bars[index], flops[index])


def small_row(found: Measurement, length: int) -> None:
    """A small layer against FlashAttention-2, forward and backward in one graph."""
    heads, batch_size = str(found.settings["small_heads"]), int(found.settings["small_batch"])
    layers = _layers(found, "small_", heads)
    x = found.random(batch_size, length, int(found.settings["small_hidden_size"]))
    source, flash = peers.flash_attention_2(found.device)
    found.say(f"FlashAttention-2 of the small peer: {source}")
    work = {}
    for name, layer in layers.items():
        attend = flash if name != "CCGQA" else peers.ours(found.fastest_attention(layer, length, batch_size))
        step = forward_and_backward(_step(layer, x, attend), [x, *layer.parameters()])
        work[name] = Captured([step], found.device, found.repeats)
    shape = f"{heads} heads of {layers['CCGQA'].head_dim}"
    what = f"MHA (FlashAttention-2) over CCGQA, {shape}, {batch_size} x {length} tokens, forward and backward"
    _add_layer(found, what, work, SMALL_BAR, batch_size * sum(peers.layer_flops(layers["CCGQA"], length)))


def kept_rows(found: Measurement) -> None:
    """What the small layers keep for backward."""
    settings = found.settings
    for each in peers.kept_beside_multi_head(
        int(settings["small_hidden_size"]),
        peers.heads_of(str(settings["small_heads"])),
        int(settings["small_head_dim"]),
        int(settings["small_batch"]),
        [int(length) for length in str(settings["small_tokens"]).split(",")],
        found.device,
    ):
        found.counts |= {f"{each.what}, CCGQA": each.ours, f"{each.what}, MHA": each.theirs}
        found.add(Row(each.what, each.ratio, KEPT_BAR, False, each.ours, each.theirs))


def _add_layer(found: Measurement, what: str, work: dict[str, Captured], bar: float | None, flops: int) -> None:
    seconds, ratios = found.compare(what, work)
    ours = seconds["CCGQA"].median
    achieved, share = f"{flops / ours / 1e12:,.1f} TFLOP/s", flops / ours / found.limits.flops
    for name, limit, title in (("MHA", bar, what), (UNROTATED, None, f"the same, {UNROTATED}")):
        found.add(Row(title, ratios[name], limit, False, ours, seconds[name].median, achieved, share))


def _layers(found: Measurement, prefix: str, heads: str) -> dict[str, CCGQA | GQA]:
    """CCGQA and its peers, of the settings that begin with ``prefix``."""
    sizes = int(found.settings[f"{prefix}hidden_size"]), int(found.settings[f"{prefix}head_dim"])
    rotated, unrotated = (peers.multi_head(*sizes, found.device, found.dtype, rotated=yes) for yes in (True, False))
    return {"CCGQA": _ccgqa(found, prefix, heads), "MHA": rotated, UNROTATED: unrotated}


def _ccgqa(found: Measurement, prefix: str, heads: str) -> CCGQA:
    sizes = int(found.settings[f"{prefix}hidden_size"]), int(found.settings[f"{prefix}head_dim"])
    layer = peers.ccgqa(sizes[0], peers.heads_of(heads), sizes[1], found.device, found.dtype)
    layer.prologue.backend = str(found.settings["prologue_backend"])
    return layer


def _inputs(found: Measurement, layer: CCGQA) -> list[Tensor]:
    """Packed projections [1, S, C + V]."""
    shape = 1, int(found.settings["prologue_tokens"]), layer.latent_size + layer.value_size
    return [found.random(*shape) for _ in range(INPUT_SETS)]


def _fused(module: Prologue, p: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
    return module(p, None, None, None, [p.shape[1]], rope)


def _step(layer: CCGQA | GQA, x: Tensor, attend: peers.Attend) -> Callable[[], Sequence[Tensor]]:
    """The layer's forward with such an attention; positions and rotation are made once, as in a model."""
    seq, rope = peers.SequenceWith(x.shape[1], x.device, attend), peers.rope_of(layer, x.shape[1], x.device)
    return lambda: (layer(x, seq, rope),)


def _of(function: Callable[..., Sequence[Tensor]], *arguments: object) -> Callable[[], Sequence[Tensor]]:
    return lambda: function(*arguments)


def _inference(function: Callable[[], Sequence[Tensor]]) -> Callable[[], object]:
    return torch.no_grad()(function)


def _check_equal(
    ours: Callable[[], Sequence[Tensor]], theirs: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]
) -> None:
    """RunError where outputs or gradients differ by more than rounding."""
    grads = [torch.randn_like(x) for x in ours()]
    results = []
    for function in (ours, theirs):
        outputs = function()
        results.append([*outputs, *torch.autograd.grad(outputs, inputs, grads)])
    for a, b in zip(*results, strict=True):
        difference = ((a.float() - b.float()).norm() / b.float().norm()).item()
        if not difference <= LARGEST_DIFFERENCE:
            raise RunError(f"the prologue and the chain differ by {difference:.1%} in a tensor {list(a.shape)}")
