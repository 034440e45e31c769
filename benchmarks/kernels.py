"""Every kernel variant that is dispatched keeps to its registers and shared memory, and uses tensor cores where meant.

Compiled for Ampere, Hopper and Blackwell, of which none has to be there. A variant that spills registers, needs more
shared or tensor memory than a block of threads may have, or misses the tensor cores it is meant for, breaks the claim.
Beside it stands, as plain counts, what the backward of the CCGQA prologue moves in ZAYA1's layer on an H200.
"""

import torch

from benchmarks.harness import Options
from benchmarks.result import Cell, Result, Samples, Setting, Table
from hydra_dist.kernels import ccgqa_prologue_bytes as account
from hydra_dist.kernels.ahead_of_time import Compiled, compile_all, kernel_modules
from hydra_dist.kernels.ccgqa_prologue_rows import Shape
from hydra_dist.kernels.specialization import CHIPS

NEEDS_GPU = False
SETTINGS: dict[str, Setting] = {"chips": ",".join(CHIPS), "processes": 2, "routine": False}
"""``routine``: only the variants that every test run compiles."""
ZAYA, ROWS, HALF = Shape(8, 2, 128, (2, 2), True, 1e-14, True), 32_768, 32
"""ZAYA1's layer, rows of one rank, rotated pairs of channels of a head."""
PROCESSORS = 132
"""Multiprocessors of an H200."""


def run(options: Options) -> Result:
    """Compile every variant of every kernel file."""
    settings = options.settings
    chips = str(settings["chips"]).split(",")
    modules = kernel_modules()
    options.say(f"{len(modules)} kernel files on {', '.join(chips)}")
    for line in account_lines():
        options.say(line)
    result = summarize(compile_all(modules, chips, int(settings["processes"]), bool(settings["routine"])))
    return result.model_copy(update={"counts": result.counts | account_counts()})


def account_counts() -> dict[str, int]:
    """Bytes that the prologue's backward moves over the memory bus, and the least that any has to."""
    what = f"prologue backward, {ROWS:,} rows, bytes"
    moved = account.memory_bytes(account.of_backward(ZAYA, ROWS, torch.bfloat16, HALF, PROCESSORS))
    return {f"{what} over the memory bus": moved, f"{what} at least": account.bound(ZAYA, ROWS, 2)}


def account_lines() -> list[str]:
    """The same by kernel and tensor, in bytes a row."""
    found = account.of_backward(ZAYA, ROWS, torch.bfloat16, HALF, PROCESSORS)
    lines = [
        f"{each.kernel}: {each.tensor}: reads {each.read / ROWS:,.0f}, writes {each.written / ROWS:,.0f} bytes a row"
        + (" (in the L2 cache)" if each.in_cache else "")
        for each in found
    ]
    return [
        *lines,
        f"over the memory bus: {account.memory_bytes(found) / account.bound(ZAYA, ROWS, 2):.2f} x the bound",
    ]


def summarize(found: list[Compiled]) -> Result:
    """The table, and whether a variant has a fault."""
    faults = [fault for compiled in found for fault in compiled.faults]
    files = {compiled.file for compiled in found}
    most = max(compiled.shared_memory / CHIPS[compiled.chip].shared_memory for compiled in found)
    finding = (
        f"{len(found)} variants of {len(files)} kernel files compiled, {len(faults)} faults; at most {most:.0%} of"
    )
    return Result(
        holds=not faults,
        finding=f"{finding} a block's shared memory" + "".join(f"; {fault}" for fault in faults),
        quantities={"seconds to compile a variant": Samples.of([compiled.seconds for compiled in found], "s")},
        counts={"variants": len(found), "faults": len(faults)},
        table=Table(
            columns=("kernel", "chip", "warps", "stages", "registers", "spilled bytes", "shared KiB", "tensor cores"),
            rows=tuple(_row(compiled) for compiled in found),
        ),
    )


def _row(compiled: Compiled) -> tuple[Cell, ...]:
    return (
        compiled.name,
        compiled.chip,
        compiled.num_warps,
        compiled.num_stages,
        compiled.registers,
        compiled.spill_stores + compiled.spill_loads,
        compiled.shared_memory / 1024,
        ", ".join(compiled.tensor_core_instructions) or ("missing" if compiled.tensor_cores_claimed else "not meant"),
    )
