"""Weights and caches on huge pages.

A token reads every weight once, in order, and on 4 kB pages that means a page walk every few lines: 12 to 15 % of a
token on the CPU this was measured on. Libraries allocate with malloc, which asks for no huge pages; Linux moves what is
there already when it is told to.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dash_export.runtime.heap import give_back_freed_memory

HUGE = 2 << 20
"""Bytes of a huge page on x86-64, and on ARM with 4 kB pages. Other sizes are left alone."""
RESIDENT = 0.5
"""Only what is in use to this share is moved: memory that is merely reserved would become real."""
RESERVED = 64 << 30
"""A region of so many bytes is address space that somebody reserved, and is not looked through."""
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25
SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
MAPS, PAGEMAP = Path("/proc/self/maps"), Path("/proc/self/pagemap")
_REGION = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw.p \S+ \S+ \S+ *(?:\[(?:heap|anon:.*)\])?")
_PIECE = 1 << 30

_moved: set[int] = set()
"""Addresses on huge pages, of all that was loaded. Giving back freed memory breaks those that have a hole."""


@contextmanager
def on_huge_pages(wanted: bool = True) -> Iterator[None]:
    """Move what is allocated inside onto huge pages, at the end: 0.3 s for 140 MB.

    Nothing happens on other systems than Linux, where the administrator set huge pages to `never`, or where the kernel
    has no free ones.
    """
    if not wanted or not _available():
        yield
        return
    # Or it would be filled without a trace: what an application freed before it loads a model, often enough to hold it.
    give_back_freed_memory()
    before = in_use()
    yield
    now = in_use()
    _moved.update(filled(now, before))
    _moved.intersection_update(enough(now))
    _move(sorted(_moved))


def zeros(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """float32 zeros in a mapping of their own, which Linux fills with huge pages as it is written, where it has them.
    From malloc they could come to lie where something was before, on the small pages of that. Raises MemoryError.
    """
    size = 4 * prod(shape)
    if sys.platform != "linux" or size < HUGE or not _available():
        return np.zeros(shape, np.float32)
    try:
        memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE)
    except OSError as error:
        raise MemoryError(f"no memory for {size >> 20} MB") from error
    with suppress(OSError):
        memory.madvise(MADV_HUGEPAGE)
    first = -np.frombuffer(memory, np.uint8).ctypes.data % HUGE
    made: npt.NDArray[np.float32] = np.ndarray(shape, np.float32, memory, first)
    return made


def _available() -> bool:
    try:
        PAGEMAP.open("rb").close()
        size = int((SETTINGS / "hpage_pmd_size").read_text())
        return size == HUGE and "[never]" not in (SETTINGS / "enabled").read_text()
    except (OSError, ValueError):
        return False


def in_use() -> dict[int, int]:
    """Of every huge page's worth of this process's own memory, by address, how many small pages are in use. Empty where
    that cannot be found out.
    """
    found: dict[int, int] = {}
    with suppress(OSError, ValueError), PAGEMAP.open("rb", buffering=0) as file:
        for first, end in own_memory(MAPS.read_text("ascii", "replace")):
            first, end = -(-first // HUGE) * HUGE, end // HUGE * HUGE
            if end - first >= RESERVED:
                continue
            for start in range(first, end, _PIECE):
                pages = range(start, min(start + _PIECE, end), HUGE)
                # 8 bytes for every small page; negative is one that is in memory.
                file.seek(start // mmap.PAGESIZE * 8)
                entries = np.frombuffer(file.read(len(pages) * HUGE // mmap.PAGESIZE * 8), np.int64)
                counts = (entries.reshape(len(pages), -1) < 0).sum(axis=1).tolist()
                found |= zip(pages, counts, strict=True)
    return found


def own_memory(maps: str) -> Iterator[tuple[int, int]]:
    """[first, end) of the regions of anonymous memory that a process may write, from `/proc/<pid>/maps`."""
    for line in maps.splitlines():
        region = _REGION.fullmatch(line)
        if region is not None:
            yield int(region[1], 16), int(region[2], 16)


def enough(now: Mapping[int, int]) -> list[int]:
    """The huge pages' worth that are in use."""
    return [page for page, count in now.items() if count >= RESIDENT * HUGE / mmap.PAGESIZE]


def filled(now: Mapping[int, int], before: Mapping[int, int]) -> list[int]:
    """The huge pages' worth that are in use and were less so before."""
    return [page for page in enough(now) if now[page] > before.get(page, 0)]


def _move(pages: Iterable[int]) -> None:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for page in pages:
        madvise(page, HUGE, MADV_HUGEPAGE)
        # One that cannot be moved does not end the matter. Linux before 6.1 refuses them all and moves them by itself,
        # in its own time.
        madvise(page, HUGE, MADV_COLLAPSE)
