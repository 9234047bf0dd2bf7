"""Memory of the process on a CPU."""

from __future__ import annotations

import ctypes
import platform

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next allocation instead of giving it back to the system.

    A training step allocates and frees gigabytes of activations. Given back, every page of them is zeroed and mapped
    anew at the next step, which took 15 % of the time of scoring with backward (SmolLM2-135M, 1024 tokens, two cores).
    It is not given back to other processes before the end, and the holes that what is kept for the backward pass leaves
    between freed blocks make it more than what is alive at once: benchmarks/results/plan.md has by how much.

    Returns:
        Whether it was done; False where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
