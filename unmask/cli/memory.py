"""Keeping freed memory in the process while a command runs."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT, LARGEST_MMAP_THRESHOLD = 2**30, 2**25
"""Bytes: what may stay free at the end of the heap, and the largest threshold that glibc takes."""


def keep_freed_memory() -> bool:
    """Make malloc keep what is freed, up to 1 GiB; whether that was done.

    By default glibc hands every freed tensor of more than a few megabytes back to the system, and the next one of the
    same size costs a page fault for each 4 KiB: about a fifth of a small model's forward on the CPU. What the user set
    in the environment stays as it is, and other C libraries are left alone.
    """
    own = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    if any(name in os.environ for name in own):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT)) and bool(mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD))
