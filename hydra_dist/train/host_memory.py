"""Keeping freed host memory in the process on a CPU run.

glibc gives a large block back to the kernel when it is freed and takes a fresh one, page by page, for the next tensor
of the same size. A training step on a CPU makes the same large tensors again and again, and the page faults can take
longer than the arithmetic.
"""

import ctypes
import sys

# Parameters of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD_BYTES = 64 * 2**20


def keep_freed_memory() -> bool:
    """Have malloc take large blocks from its heap and keep what is freed; False where the C library is not glibc.

    The process's resident memory stays at its highest point, which a training step reaches every time anyway.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, TOP_PAD_BYTES))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
