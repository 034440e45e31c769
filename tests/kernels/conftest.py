"""Kernels are tested on the GPU where there is one, and under Triton's interpreter on the CPU where there is none.

``@triton.jit`` decides between compiling and interpreting when a kernel is defined, and Triton's own functions are such
kernels, so ``TRITON_INTERPRET`` has to be set before ``triton`` is first imported; ``tests/conftest.py`` does that.
Compiling kernels for chips that are not there happens in processes of its own (``compile_kernels``), which do not
inherit the variable.

The interpreter computes matrix products of bf16 wrongly (it multiplies the bits), so there kernels are tested in fp32
and fp16.
"""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    if isinstance(tl.sum, JITFunction):
        raise pytest.UsageError("there is no GPU, and TRITON_INTERPRET=1 was not set before triton was imported")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run here."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(scope="session")
def half_dtypes() -> tuple[torch.dtype, ...]:
    """The 16-bit dtypes that kernels can be tested with here."""
    return (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)


@pytest.fixture(scope="session")
def compile_kernels() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``compile_kernels(*arguments)``: run ``hydra_dist.kernels.ahead_of_time`` with them, without the interpreter."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "hydra_dist.kernels.ahead_of_time", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=2400)

    return run
