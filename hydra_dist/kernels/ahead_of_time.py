"""Compiling kernels for a chip that is not there, and what the compiler says of the result.

A GPU's compiler needs no GPU. Registers that spill to memory, shared memory beyond what a block may have, and products
that miss the tensor cores all show in its output.

``python -m hydra_dist.kernels.ahead_of_time [MODULE or FILE ...] [--chip sm_90 ...] [--processes 2]`` prints one JSON
object a line for each compiled variant, of every kernel file here by default.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from hydra_dist.kernels.specialization import ALIGNMENT, CHIPS, Specialization

TENSOR_CORE_INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
"""In PTX: Ampere and later, Hopper, Blackwell. Source: PTX ISA, warp-level and asynchronous matrix instructions."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one variant on one chip."""

    file: str
    """The kernel's file, without its folder."""
    name: str
    """That of the specialization."""
    chip: str
    num_warps: int
    num_stages: int
    registers: int
    """Of one thread."""
    spill_stores: int
    """Bytes that one thread writes because registers do not suffice."""
    spill_loads: int
    shared_memory: int
    """Bytes of one block of threads."""
    tensor_memory: int
    """Columns of one block of threads; 0 on chips without tensor memory."""
    tensor_core_instructions: tuple[str, ...]
    """Which of ``TENSOR_CORE_INSTRUCTIONS`` the code has."""
    tensor_cores_claimed: bool
    seconds: float
    """That compiling took."""

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong with it, in words; empty where it is as it should be."""
        found = []
        if self.spill_stores or self.spill_loads:
            found.append(f"spills {self.spill_stores} bytes and loads {self.spill_loads} ({self.registers} registers)")
        chip = CHIPS[self.chip]
        if self.shared_memory > chip.shared_memory:
            found.append(f"needs {self.shared_memory} bytes of shared memory, and a block has {chip.shared_memory}")
        if self.tensor_memory > chip.tensor_memory:
            found.append(f"needs {self.tensor_memory} columns of tensor memory, and a block has {chip.tensor_memory}")
        if self.tensor_cores_claimed and not self.tensor_core_instructions:
            found.append("is meant for tensor cores and has none of their instructions")
        return tuple(f"{self.file}: {self.name} on {self.chip}: {fault}" for fault in found)


def compile_for(specialization: Specialization, chip: str) -> Compiled:
    """Compile one variant for ``chip``, a key of ``CHIPS``.

    Raises:
        ValueError: the kernel was imported under the interpreter (TRITON_INTERPRET=1), so there is nothing to compile.
        RuntimeError: the compiler's report lacks what is read from it.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = specialization.kernel
    if not isinstance(kernel, triton.JITFunction):
        raise ValueError(
            f"{specialization.name}: the kernel is a {type(kernel).__name__}, made for the interpreter; without "
            "TRITON_INTERPRET in the environment it can be compiled"
        )
    types = {argument: kind.partition(":")[0] for argument, kind in specialization.signature.items()}
    aligned = [a for a, kind in specialization.signature.items() if kind[0] == "*" or kind.endswith(f":{ALIGNMENT}")]
    order = kernel.arg_names.index
    source = ASTSource(
        fn=kernel,
        signature={argument: types.get(argument, "constexpr") for argument in kernel.arg_names},
        constexprs=dict(specialization.constexprs),
        attrs={(order(argument),): [["tt.divisibility", ALIGNMENT]] for argument in aligned},
    )
    started = time.perf_counter()
    with _uncached_with_report() as report:
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", CHIPS[chip].capability, 32),
            options={"num_warps": specialization.num_warps, "num_stages": specialization.num_stages},
        )
    seconds = time.perf_counter() - started
    text, ptx = report.getvalue(), compiled.asm["ptx"]
    return Compiled(
        file=Path(kernel.fn.__code__.co_filename).name,
        name=specialization.name,
        chip=chip,
        num_warps=specialization.num_warps,
        num_stages=specialization.num_stages,
        registers=max(_numbers(r"Used (\d+) registers", text)),
        spill_stores=sum(_numbers(r"(\d+) bytes spill stores", text)),
        spill_loads=sum(_numbers(r"(\d+) bytes spill loads", text)),
        shared_memory=compiled.metadata.shared,
        tensor_memory=compiled.metadata.tmem_size or 0,
        tensor_core_instructions=tuple(name for name in TENSOR_CORE_INSTRUCTIONS if name in ptx),
        tensor_cores_claimed=specialization.tensor_cores,
        seconds=round(seconds, 3),
    )


def kernel_modules() -> list[str]:
    """The names of the modules of this package that have ``specializations``, by their source."""
    here = Path(__file__).parent
    marked = [path.stem for path in sorted(here.glob("*.py")) if "\ndef specializations(" in path.read_text("utf-8")]
    return [f"{__package__}.{stem}" for stem in marked]


def compile_all(
    modules: Iterable[str], chips: Sequence[str] = tuple(CHIPS), processes: int = 1, routine: bool = False
) -> list[Compiled]:
    """Compile the specializations of ``modules`` for those of ``chips`` that they are dispatched on.

    Args:
        modules: names of modules, or paths of ``.py`` files.
        processes: how many compile at the same time.
        routine: only those that every test run compiles, instead of all.
    """
    tasks = [
        (module, index, chip)
        for module in modules
        for index, specialization in enumerate(_load(module).specializations())
        for chip in specialization.chips
        if chip in chips and (specialization.routine or not routine)
    ]
    if processes == 1:
        return [_compile(task) for task in tasks]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_compile, tasks))


def main(arguments: Sequence[str]) -> int:
    """Print what the compiler says of each variant; 1 where one has a fault."""
    parser = argparse.ArgumentParser(prog="python -m hydra_dist.kernels.ahead_of_time")
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="a module's name or the path of a .py file")
    parser.add_argument("--chip", action="append", choices=CHIPS, help="only this chip; may be repeated")
    parser.add_argument("--processes", type=int, default=1, help="how many compile at the same time")
    parser.add_argument("--routine", action="store_true", help="only what every test run compiles")
    asked = parser.parse_args(arguments)
    modules, chips = asked.modules or kernel_modules(), asked.chip or tuple(CHIPS)
    found = compile_all(modules, chips, asked.processes, asked.routine)
    for compiled in found:
        print(json.dumps(asdict(compiled) | {"faults": compiled.faults}))
    return 1 if any(compiled.faults for compiled in found) else 0


def _compile(task: tuple[str, int, str]) -> Compiled:
    module, index, chip = task
    return compile_for(_load(module).specializations()[index], chip)


def _load(module: str) -> ModuleType:
    if not module.endswith(".py"):
        return importlib.import_module(module)
    name = f"{__name__}:{module}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, module)
        if spec is None or spec.loader is None:
            raise ValueError(f"{module}: not a Python file")
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        sys.modules[name] = loaded
    return sys.modules[name]


@contextlib.contextmanager
def _uncached_with_report() -> Iterator[io.StringIO]:
    """The assembler's report, which Triton prints where it is asked to, and only when it really compiles."""
    from triton import knobs

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()) as report,
        knobs.cache.scope(),
        knobs.nvidia.scope(),
    ):
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True
        yield report


def _numbers(pattern: str, text: str) -> list[int]:
    found = [int(number) for number in re.findall(pattern, text)]
    if not found:
        raise RuntimeError(f'the assembler\'s report has no "{pattern}":\n{text}')
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
