"""Keep freed memory in the process, on CPU with glibc."""

from __future__ import annotations

import ctypes
import os
import platform

# numbers of glibc's malloc.h, and the largest values that it takes
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_TRIM, _LARGEST_MMAP = 2**31 - 1, 32 * 1024 * 1024

# whoever sets one of these has made a choice of his own
_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Tell glibc not to hand freed tensors back to the system between steps.

    A step makes and frees the same tensors again and again. glibc returns the large ones to the kernel, which must then map
    and clear every page anew: about a tenth of a short step's time. What is kept is bounded by the largest step.

    Returns:
        Whether it was done: not without glibc, and not where the environment already chooses how memory is allocated.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _CHOSEN):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP)) and bool(mallopt(_TRIM_THRESHOLD, _LARGEST_TRIM))
