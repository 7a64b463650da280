"""Memory that a pass over a prompt frees stays with the process.

Buffers of many tokens are megabytes each. glibc gives what is freed back to Linux, and the next layer's pass gets it
cleared anew, page by page: 15,000 faults and 3 % of a prompt of 512 tokens. What the process keeps is what it had used
at its peak.
"""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 32 << 20
"""Bytes of a buffer that is taken from the heap; more, glibc before 2.36 refuses."""
KEPT = 256 << 20
_OWN_WISHES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Whether it is kept from now on, for the whole process: with glibc, unless the environment says what malloc shall
    do.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _OWN_WISHES):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(M_MMAP_THRESHOLD, LARGEST)) and bool(libc.mallopt(M_TRIM_THRESHOLD, KEPT))
