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
    do. Buffers are then pieces of one heap, where they would be mapped one by one.
    """
    libc = _glibc()
    return libc is not None and bool(libc.mallopt(M_MMAP_THRESHOLD, LARGEST) and libc.mallopt(M_TRIM_THRESHOLD, KEPT))


def give_back_freed_memory() -> None:
    """To Linux, once: pages in the midst of the heap too. With glibc, unless the environment says what malloc shall do.
    Threads that allocate wait for it, some milliseconds.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux" or any(name in os.environ for name in _OWN_WISHES):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
