"""Every kernel variant that is dispatched keeps to its registers and shared memory, and uses tensor cores where meant.

Compiled for Ampere, Hopper and Blackwell, of which none has to be there. A variant that spills registers, needs more
shared or tensor memory than a block of threads may have, or misses the tensor cores it is meant for, breaks the claim.
"""

from benchmarks.harness import Options
from benchmarks.result import Cell, Result, Samples, Setting, Table
from hydra_dist.kernels.ahead_of_time import Compiled, compile_all, kernel_modules
from hydra_dist.kernels.specialization import CHIPS

NEEDS_GPU = False
SETTINGS: dict[str, Setting] = {"chips": ",".join(CHIPS), "processes": 2, "routine": False}
"""``routine``: only the variants that every test run compiles."""


def run(options: Options) -> Result:
    """Compile every variant of every kernel file."""
    settings = options.settings
    chips = str(settings["chips"]).split(",")
    modules = kernel_modules()
    options.say(f"{len(modules)} kernel files on {', '.join(chips)}")
    return summarize(compile_all(modules, chips, int(settings["processes"]), bool(settings["routine"])))


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
