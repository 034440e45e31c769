"""A CCGQA layer without its attention takes at most twice the time of its matrix products; it keeps a third of MHA.

On a CPU. The products are those of the down-projection, of the grouped convolution and of the up-projection, forward,
and their gradients for inputs and weights; the layer is all of that with convolutions, q-k-mean, q-k-norm, rotation and
value shift, and queries in the place of what attention gives. Kept for backward is counted in bf16 against multi-head
attention of the same width, without the layer's input, in bytes that do not depend on the device.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.attention_peers import KeptBytes, ccgqa, heads_of, kept_beside_multi_head, rope_of
from benchmarks.gpu_timing import spread
from benchmarks.harness import Options, interleaved
from benchmarks.result import Cell, Result, Samples, Setting, Table
from hydra_dist.model import CCGQA

NEEDS_GPU = False
SETTINGS: dict[str, Setting] = {
    "hidden_size": 512,
    "sequence_length": 8192,
    "head_dim": 64,
    "heads": "2/1,4/2,8/2",
    "rounds": 10,
    "largest_ratio": 2.0,
    "kept_heads": "2/1",
    "kept_batch": 4,
    "kept_lengths": "512,1024",
    "least_kept_ratio": 3.0,
}
"""``heads``: query/key heads of each layer. ``kept_*``: of the comparison with multi-head attention."""

COLUMNS = ("what", "bound", "ratio, median", "quartiles", "layer", "compared with")
Functions = tuple[Callable[[], object], Callable[[], object]]


def run(options: Options) -> Result:
    """Time each layer beside its products, and count what is kept."""
    settings, device = options.settings, torch.device(options.device)
    largest, least = float(settings["largest_ratio"]), float(settings["least_kept_ratio"])
    rows: list[tuple[Cell, ...]] = []
    quantities: dict[str, Samples] = {}
    counts: dict[str, int] = {}
    worst, fewest = 0.0, float("inf")
    for heads in map(heads_of, str(settings["heads"]).split(",")):
        layer = ccgqa(int(settings["hidden_size"]), heads, int(settings["head_dim"]), device, torch.float32)
        for name, (products, whole) in alternatives(layer, int(settings["sequence_length"])).items():
            measured = interleaved({"products": products, "layer": whole}, int(settings["rounds"]))
            what = f"{heads[0]}/{heads[1]} heads, {name}"
            ratio = measured.ratios["layer"]
            quantities |= {f"{what}, {kind}": samples for kind, samples in measured.seconds.items()}
            quantities[f"{what}, ratio"] = ratio
            worst = max(worst, ratio.median)
            milliseconds = [f"{1e3 * measured.seconds[kind].median:.1f} ms" for kind in ("layer", "products")]
            rows.append((what, f"<= {largest:g}", ratio.median, spread(ratio), *milliseconds))
            options.say(f"{what}: {ratio.median:.3f} times its products")
    for each in kept(options):
        counts |= {f"{each.what}, CCGQA": each.ours, f"{each.what}, MHA": each.theirs}
        fewest = min(fewest, each.ratio)
        rows.append((each.what, f">= {least:g}", each.ratio, "exact", f"{each.ours:,} B", f"{each.theirs:,} B"))
    return Result(
        holds=worst <= largest and fewest >= least,
        finding=f"at most {worst:.2f} times the products (bound {largest:g}); multi-head attention keeps at least "
        f"{fewest:.2f} times the bytes (bound {least:g})",
        quantities=quantities,
        counts=counts,
        table=Table(columns=COLUMNS, rows=tuple(rows)),
    )


def alternatives(layer: CCGQA, length: int) -> dict[str, Functions]:
    """(products alone, layer without attention) for forward, and for forward and backward."""
    weight = layer.output.weight
    grouped = layer.prologue.grouped_weight
    assert grouped is not None
    generator = torch.Generator(weight.device).manual_seed(0)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=weight.device, requires_grad=True)

    x, latent = rows(1, length, weight.shape[0]), rows(1, length, weight.shape[1])
    columns = rows(grouped.shape[0], length, grouped.shape[1])
    rope = rope_of(layer, length, weight.device)

    def products() -> tuple[Tensor, ...]:
        return layer.down(x), torch.bmm(columns, grouped), layer.output(latent)

    def whole() -> tuple[Tensor, ...]:
        q, k, v = layer.queries_keys_values(x, None, rope)
        return layer.output(q.flatten(2)), k, v

    weights = [layer.down.weight, grouped, weight]
    return {
        "forward": (products, whole),
        "forward and backward": (
            _with_backward(products, [x, columns, latent, *weights], generator),
            _with_backward(whole, [x, *layer.parameters()], generator),
        ),
    }


def kept(options: Options) -> list[KeptBytes]:
    """The comparison with multi-head attention at each length."""
    settings = options.settings
    found = kept_beside_multi_head(
        int(settings["hidden_size"]),
        heads_of(str(settings["kept_heads"])),
        int(settings["head_dim"]),
        int(settings["kept_batch"]),
        [int(length) for length in str(settings["kept_lengths"]).split(",")],
        torch.device(options.device),
    )
    for each in found:
        options.say(f"{each.what}: {each.ours:,} bytes, multi-head attention {each.theirs:,}")
    return found


def _with_backward(
    function: Callable[[], tuple[Tensor, ...]], inputs: list[Tensor], generator: torch.Generator
) -> Callable[[], object]:
    """``function`` and the gradients of ``inputs`` for random gradients of what it gives."""
    grads = [torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype) for x in function()]
    return lambda: torch.autograd.grad(function(), inputs, grads)
