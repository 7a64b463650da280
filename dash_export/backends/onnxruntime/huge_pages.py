"""Weights on huge pages.

A decoded token reads every weight once, in order. On 4 kB pages that means a page walk every few lines: 12 to 15 % of a
token's time on the CPU this was measured on. Libraries allocate with malloc, which asks for no huge pages, but Linux
moves memory that is already in use when told to.
"""

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
"""Move only pages of which at least this share is in use: memory that is merely reserved would become real."""
RESERVED = 64 << 30
"""A region of so many bytes or more is reserved address space and is not scanned."""
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
MAPS, PAGEMAP = Path("/proc/self/maps"), Path("/proc/self/pagemap")
_REGION = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw.p \S+ \S+ \S+ *(?:\[(?:heap|anon:.*)\])?")
_PIECE = 1 << 30
_moved: set[int] = set()
"""Addresses of all pages moved so far. `malloc_trim` breaks those that have a hole, so each call moves them again."""
_OWN_WISHES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Keep buffers up to 32 MB on the heap of this process, and keep up to 256 MB of the heap when it is freed. On the
    heap weights fill huge pages, which buffers mapped one by one do not; a prompt of 512 tokens saves 15,000 page
    faults (3 %).

    Works only with glibc, and unless the environment configures malloc. Return whether it works here.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _OWN_WISHES):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(M_MMAP_THRESHOLD, 32 << 20) and libc.mallopt(M_TRIM_THRESHOLD, 256 << 20))


@contextmanager
def on_huge_pages(wanted: bool = True) -> Iterator[None]:
    """Move memory that is allocated inside the block onto huge pages, at its end: 0.3 s for 140 MB. Older memory stays:
    moving it takes seconds, and copies what a forked process shares with its parent.

    Do nothing on other systems than Linux, where the administrator set huge pages to `never`, or where the kernel has
    no free ones.
    """
    if not wanted or not available():
        yield
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc: new data in freed memory that is still resident would not be noticed
        libc.malloc_trim(0)
    before = pages_in_use()
    yield
    now = {page: share for page, share in pages_in_use().items() if share >= RESIDENT}
    _moved.update(page for page, share in now.items() if share > before.get(page, 0.0))
    _moved.intersection_update(now)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for page in sorted(_moved):
        libc.madvise(page, HUGE, MADV_HUGEPAGE)
        # A page that cannot be moved does not stop the others. Linux before 6.1 refuses all calls and moves pages by
        # itself, in its own time.
        libc.madvise(page, HUGE, MADV_COLLAPSE)


def available() -> bool:
    """Return whether this system has huge pages of 2 MiB and its administrator allows them."""
    try:
        size = int((SETTINGS / "hpage_pmd_size").read_text())
        return size == HUGE and "[never]" not in (SETTINGS / "enabled").read_text()
    except (OSError, ValueError):
        return False


def pages_in_use() -> dict[int, float]:
    """Return {address: share in use} for every huge page's worth of this process's own memory that is in use."""
    found: dict[int, float] = {}
    with suppress(OSError, ValueError), PAGEMAP.open("rb", buffering=0) as file:
        for first, end in own_memory(MAPS.read_text("ascii", "replace")):
            first, end = -(-first // HUGE) * HUGE, end // HUGE * HUGE
            for start in range(first, end, _PIECE):
                pages = range(start, min(start + _PIECE, end), HUGE)
                # An entry has 8 bytes and stands for a small page; it is negative if the page is in memory.
                file.seek(start // mmap.PAGESIZE * 8)
                entries = np.frombuffer(file.read(len(pages) * HUGE // mmap.PAGESIZE * 8), np.int64)
                shares = (entries.reshape(len(pages), -1) < 0).mean(axis=1).tolist()
                found |= {page: share for page, share in zip(pages, shares, strict=True) if share}
    return found


def own_memory(maps: str) -> Iterator[tuple[int, int]]:
    """Yield [first, end) of every region of writable anonymous memory in `/proc/<pid>/maps`, but RESERVED ones."""
    for region in map(_REGION.fullmatch, maps.splitlines()):
        if region is not None and int(region[2], 16) - int(region[1], 16) < RESERVED:
            yield int(region[1], 16), int(region[2], 16)
