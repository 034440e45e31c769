"""Which compiled variants of a Triton kernel there are, and what the chips that they run on offer.

Triton compiles a kernel once for each combination of argument types, of what it may assume of them (a pointer or an
integer is a multiple of 16, an integer is 1), of compile-time constants, and of warps and pipeline stages. A kernel
file lists the combinations that its launcher comes to in ``specializations() -> list[Specialization]``, so that they
can be compiled and looked at on a machine without a GPU: ``python -m hydra_dist.kernels.ahead_of_time``.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ALIGNMENT = 16
"""What Triton's launcher looks for: pointers (in bytes) and integers that are multiples of it."""


@dataclass(frozen=True)
class Chip:
    """What a kernel has to fit into."""

    capability: int
    """CUDA's compute capability, major and minor digit."""
    shared_memory: int
    """Bytes that one block of threads may have."""
    tensor_memory: int
    """Columns of tensor memory, of 128 x 4 bytes each, that one block of threads may have."""


CHIPS = {
    "sm_80": Chip(80, 163 * 1024, 0),
    "sm_90": Chip(90, 227 * 1024, 0),
    "sm_100": Chip(100, 227 * 1024, 512),
}
"""Source: CUDA C++ Programming Guide, technical specifications per compute capability; PTX ISA, tensor memory."""


@dataclass(frozen=True, kw_only=True)
class Specialization:
    """One variant of a kernel that a launcher dispatches. ``of_launch`` makes one from a launch's arguments."""

    name: str
    """Names the variant in tables: operation, dtype, shape, such as ``attention_forward bf16 d128 causal``."""
    kernel: Any
    """The ``@triton.jit`` function."""
    signature: Mapping[str, str]
    """Argument to type: ``*bf16``, ``i32``, ``i32:16`` for an integer that is a multiple of 16, ``fp32``. Pointers are
    taken to be aligned to 16 bytes, as a tensor's storage is."""
    constexprs: Mapping[str, Any]
    """Argument to its value at compile time, also for integers that are 1 and for absent (None) pointers."""
    num_warps: int
    num_stages: int
    chips: tuple[str, ...] = tuple(CHIPS)
    """Where this variant is dispatched: keys of ``CHIPS``."""
    tensor_cores: bool
    """Whether its products are meant to run on tensor cores (fp32 in full precision does not)."""
    routine: bool = True
    """Whether every test run compiles it. The others have a sibling among these that is at least as demanding, or much
    the same, and are compiled by the full tests and the benchmark."""

    def __post_init__(self) -> None:
        expected = list(self.kernel.arg_names)
        given = [*self.signature, *self.constexprs]
        missing, unknown = [n for n in expected if n not in given], [n for n in given if n not in expected]
        if missing or unknown or len(set(given)) != len(given):
            raise ValueError(
                f"{self.name}: {self.kernel.__name__} takes {', '.join(expected)}; missing: "
                f"{', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}; signature and constexprs "
                "share no name"
            )
        wrong = [chip for chip in self.chips if chip not in CHIPS]
        if wrong or not self.chips:
            raise ValueError(f"{self.name}: chips {list(self.chips)}; known are {', '.join(CHIPS)}")


def of_launch(
    name: str,
    kernel: Any,
    arguments: Mapping[str, Any],
    *,
    num_warps: int,
    num_stages: int,
    tensor_cores: bool,
    chips: tuple[str, ...] = tuple(CHIPS),
    routine: bool = True,
) -> Specialization:
    """The variant that Triton would compile for a launch with these arguments.

    Args:
        arguments: all of the kernel's arguments by name. Tensors may be on the meta device, where they take no memory.
    """
    parameters = inspect.signature(kernel.fn).parameters.values()
    constant = {parameter.name for parameter in parameters if "constexpr" in str(parameter.annotation)}
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    for argument, value in arguments.items():
        kind = None if argument in constant else _type_of(argument, value)
        if kind is None:
            constexprs[argument] = value
        else:
            signature[argument] = kind
    return Specialization(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=num_warps,
        num_stages=num_stages,
        chips=chips,
        tensor_cores=tensor_cores,
        routine=routine,
    )


_POINTERS = {
    "torch.bfloat16": "*bf16",
    "torch.float16": "*fp16",
    "torch.float32": "*fp32",
    "torch.float64": "*fp64",
    "torch.float8_e4m3fn": "*fp8e4nv",
    "torch.float8_e5m2": "*fp8e5",
    "torch.int8": "*i8",
    "torch.int16": "*i16",
    "torch.int32": "*i32",
    "torch.int64": "*i64",
    "torch.uint8": "*u8",
    "torch.bool": "*i1",
}


def _type_of(name: str, value: Any) -> str | None:
    """Triton's type of an argument, or None where it becomes a constant."""
    if value is None or (type(value) is int and value == 1):
        return None
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        size = "i32" if -(2**31) <= value < 2**31 else "i64"
        return f"{size}:{ALIGNMENT}" if value % ALIGNMENT == 0 else size
    if isinstance(value, float):
        return "fp32"
    pointer = _POINTERS.get(str(getattr(value, "dtype", None)))
    if pointer is None:
        raise ValueError(f"{name}={value!r}: a tensor, a number or None is needed")
    return pointer
