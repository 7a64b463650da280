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
from mmap import PAGESIZE
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dash_export.runtime.heap import give_back_freed_memory

HUGE = 2 << 20
"""Bytes of a huge page on x86-64, and on ARM with 4 kB pages."""
RESIDENT = 0.9
"""Only what is in use to this share is moved: memory that is merely reserved would become real."""
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MAPS, PAGEMAP = Path("/proc/self/maps"), Path("/proc/self/pagemap")
_REGION = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw.p \S+ \S+ \S+ *(?:\[heap\])?")


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
    _move(filled(in_use(), before))


def zeros(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """float32 zeros in a mapping of their own, which Linux fills with huge pages as it is used, where it has them. From
    malloc they could come to lie where something was before, on the small pages of that. Raises MemoryError.
    """
    count = prod(shape)
    if sys.platform != "linux" or count * 4 < HUGE:
        return np.zeros(shape, np.float32)
    try:
        memory = mmap.mmap(-1, count * 4 + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for {count * 4 >> 20} MB") from error
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    first = -whole.ctypes.data % HUGE
    return whole[first : first + count * 4].view(np.float32).reshape(shape)


def _available() -> bool:
    try:
        PAGEMAP.open("rb").close()
        return "[never]" not in SETTING.read_text()
    except OSError:
        return False


def in_use() -> dict[int, int]:
    """Of every huge page's worth of this process's own memory, by address, how many small pages are in use."""
    found: dict[int, int] = {}
    with PAGEMAP.open("rb") as file:
        for first, end in own_memory(MAPS.read_text()):
            first, end = -(-first // HUGE) * HUGE, end // HUGE * HUGE
            if end > first:
                # 8 bytes for every small page; the highest bit says that it is in memory.
                file.seek(first // PAGESIZE * 8)
                entries = np.frombuffer(file.read((end - first) // PAGESIZE * 8), np.uint64) >> np.uint64(63)
                counts = entries.reshape(-1, HUGE // PAGESIZE).sum(axis=1).tolist()
                found |= zip(range(first, end, HUGE), counts, strict=True)
    return found


def own_memory(maps: str) -> Iterator[tuple[int, int]]:
    """[first, end) of the regions of anonymous memory that a process may write, from `/proc/<pid>/maps`."""
    for line in maps.splitlines():
        region = _REGION.fullmatch(line)
        if region is not None:
            yield int(region[1], 16), int(region[2], 16)


def filled(now: Mapping[int, int], before: Mapping[int, int]) -> list[int]:
    """The huge pages' worth that are in use and were less so before."""
    enough = RESIDENT * HUGE / PAGESIZE
    return [page for page, count in now.items() if count >= enough and count > before.get(page, 0)]


def _move(pages: Iterable[int]) -> None:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for page in pages:
        madvise(page, HUGE, MADV_HUGEPAGE)
        # One that cannot be moved does not end the matter. Linux before 6.1 refuses them all and moves them by itself,
        # in its own time.
        madvise(page, HUGE, MADV_COLLAPSE)
