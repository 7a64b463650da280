"""Weights on huge pages.

A token reads every weight once, in order, and on 4 kB pages that means a page walk every few lines: 12 to 15 % of a
token on the CPU this was measured on. Libraries allocate with malloc, which asks for no huge pages; Linux moves what is
there already when it is told to.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

HUGE = 2 << 20
"""Bytes of a huge page on x86-64, and on ARM with 4 kB pages. Other sizes are left alone."""
RESIDENT = 0.5
"""Only what is in use to this share is moved: memory that is merely reserved would become real."""
RESERVED = 64 << 30
"""A region of so many bytes is address space that somebody reserved, and is not looked through."""
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
MAPS, PAGEMAP = Path("/proc/self/maps"), Path("/proc/self/pagemap")
_REGION = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw.p \S+ \S+ \S+ *(?:\[(?:heap|anon:.*)\])?")
_PIECE = 1 << 30
_moved: set[int] = set()
"""Addresses of all that was moved. Giving back freed memory breaks those that have a hole."""
_OWN_WISHES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Keep buffers up to 32 MB in one heap of this process, and up to 256 MB of it when it is freed: weights fill huge
    pages there, which mapped one by one they do not, and a prompt of 512 tokens saves 15,000 page faults (3 %).

    Only with glibc, and unless the environment says what malloc shall do. Returns whether it is so now.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _OWN_WISHES):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(M_MMAP_THRESHOLD, 32 << 20) and libc.mallopt(M_TRIM_THRESHOLD, 256 << 20))


@contextmanager
def on_huge_pages(wanted: bool = True) -> Iterator[None]:
    """Move what is allocated inside onto huge pages, at the end: 0.3 s for 140 MB. What was there before is not ours to
    move: that takes seconds, and copies what a forked process shares with its parent.

    Nothing happens on other systems than Linux, where the administrator set huge pages to `never`, or where the kernel
    has no free ones.
    """
    if not wanted or not available():
        yield
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc: what was freed before would be filled without a trace
        libc.malloc_trim(0)
    before = pages_in_use()
    yield
    now = {page: share for page, share in pages_in_use().items() if share >= RESIDENT}
    _moved.update(page for page, share in now.items() if share > before.get(page, 0.0))
    _moved.intersection_update(now)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for page in sorted(_moved):
        libc.madvise(page, HUGE, MADV_HUGEPAGE)
        # One that cannot be moved does not end the matter. Linux before 6.1 refuses them all and moves them by itself,
        # in its own time.
        libc.madvise(page, HUGE, MADV_COLLAPSE)


def available() -> bool:
    """Whether this system has huge pages of 2 MiB, and its administrator lets them be used."""
    try:
        size = int((SETTINGS / "hpage_pmd_size").read_text())
        return size == HUGE and "[never]" not in (SETTINGS / "enabled").read_text()
    except (OSError, ValueError):
        return False


def pages_in_use() -> dict[int, float]:
    """The share in use of every huge page's worth of this process's own memory, by address."""
    found: dict[int, float] = {}
    with suppress(OSError, ValueError), PAGEMAP.open("rb", buffering=0) as file:
        for first, end in own_memory(MAPS.read_text("ascii", "replace")):
            first, end = -(-first // HUGE) * HUGE, end // HUGE * HUGE
            for start in range(first, end, _PIECE):
                pages = range(start, min(start + _PIECE, end), HUGE)
                # 8 bytes for every small page; negative is one that is in memory.
                file.seek(start // mmap.PAGESIZE * 8)
                entries = np.frombuffer(file.read(len(pages) * HUGE // mmap.PAGESIZE * 8), np.int64)
                shares = (entries.reshape(len(pages), -1) < 0).mean(axis=1).tolist()
                found |= {page: share for page, share in zip(pages, shares, strict=True) if share}
    return found


def own_memory(maps: str) -> Iterator[tuple[int, int]]:
    """[first, end) of the regions of anonymous memory that a process may write, from `/proc/<pid>/maps`."""
    for region in map(_REGION.fullmatch, maps.splitlines()):
        if region is not None and int(region[2], 16) - int(region[1], 16) < RESERVED:
            yield int(region[1], 16), int(region[2], 16)
