"""What is moved onto huge pages, and what is not."""

from __future__ import annotations

import mmap
import platform
from pathlib import Path

import numpy as np
import pytest

from dash_export.runtime import huge_pages
from dash_export.runtime.huge_pages import HUGE, filled, in_use, on_huge_pages, own_memory, zeros
from tests.commands.helpers import python

MOVES = huge_pages._available() and tuple(map(int, platform.release().split(".")[:2])) >= (6, 1)
needs_moves = pytest.mark.skipif(not MOVES, reason="this system moves no memory onto huge pages when told to")

PRELUDE = """
import sys
import numpy as np
from dash_export.runtime.heap import keep_freed_memory
from dash_export.runtime.huge_pages import on_huge_pages, zeros
def huge():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("AnonHugePages:")) >> 10
"""


def printed(program: str, *arguments: str) -> list[str]:
    """The words that a process of its own prints; `huge()` in it are its MiB on huge pages."""
    finished = python(PRELUDE + program, *arguments)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.split()


MAPS = """\
55d0c0000000-55d0c0400000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000800000 rw-p 00000000 00:00 0
7f0000800000-7f0000a00000 rw-p 00000000 08:01 1234                       /models/layer.data
7f0000900000-7f0000a00000 rw-p 00000000 00:00 0                          [anon: glibc: malloc]
7f0000a00000-7f0000c00000 rw-s 00000000 00:01 77
7f0001000000-7f0001400000 r--p 00000000 08:01 1234                       /usr/lib/libonnx.so
7f0002000000-7f0002400000 r-xp 00000000 00:00 0
7ffc00000000-7ffc00200000 rw-p 00000000 00:00 0                          [stack]
"""

PROGRAM = """
mine = bytearray(16 << 20)
before = huge()
with on_huge_pages(sys.argv[1] == "yes"):
    weights = [bytearray(b"w" * (1 << 20)) for _ in range(32)]
print(huge() - before, all(item == b"w" * (1 << 20) for item in weights))
"""


FREED = """
keep_freed_memory()
work = [bytearray(b"x" * (1 << 18)) for _ in range(256)]
last = bytearray(b"x" * 1000)
del work
before = huge()
with on_huge_pages():
    weights = [bytearray(b"w" * (1 << 18)) for _ in range(128)]
print(huge() - before)
"""


def test_only_private_memory_that_may_be_written_counts() -> None:
    assert list(own_memory(MAPS)) == [
        (0x55D0C0000000, 0x55D0C0400000),
        (0x7F0000000000, 0x7F0000800000),
        (0x7F0000900000, 0x7F0000A00000),
    ]


def test_what_came_into_use_is_moved() -> None:
    """What was there before is left alone, and so is what is merely reserved."""
    before = {0: 512, HUGE: 0, 2 * HUGE: 100, 3 * HUGE: 0, 5 * HUGE: 500}
    now = {0: 512, HUGE: 512, 2 * HUGE: 500, 3 * HUGE: 200, 4 * HUGE: 300, 5 * HUGE: 480}
    assert filled(now, before) == [HUGE, 2 * HUGE, 4 * HUGE]


@needs_moves
def test_use_is_counted_in_small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    with mmap.mmap(-1, 3 * HUGE, flags=mmap.MAP_PRIVATE) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        view = np.frombuffer(memory, np.uint8)
        start = -view.ctypes.data % HUGE
        view[start : start + 10 * mmap.PAGESIZE : mmap.PAGESIZE] = 1
        page = view.ctypes.data + start
        count = in_use().get(page)
        monkeypatch.setattr(huge_pages, "RESERVED", HUGE)
        assert page not in in_use()
        del view
    assert count == 10


def moved(wanted: str) -> tuple[int, bool]:
    """MiB that a process's 32 buffers of 1 MiB brought onto huge pages, and whether they still hold what they held."""
    size, whole = printed(PROGRAM, wanted)
    return int(size), whole == "True"


@needs_moves
def test_small_buffers_come_to_lie_on_huge_pages() -> None:
    size, whole = moved("yes")
    assert size >= 20
    assert whole
    assert moved("no") == (0, True)


@needs_moves
def test_what_had_been_freed_and_is_filled_is_moved_too() -> None:
    """As of an application that worked before it loads a model: most of the heap is free, and still there."""
    assert int(printed(FREED)[0]) >= 24


CACHE = """
keep_freed_memory()
work = [bytearray(b"x" * (1 << 18)) for _ in range(256)]
del work
before = huge()
made = zeros((4, 1 << 20))
assert made.shape == (4, 1 << 20) and made.dtype == np.float32
made[:] = 1
print(huge() - before)
assert not zeros((4, 1 << 20)).any()
"""


@needs_moves
def test_a_cache_lies_on_huge_pages_whatever_was_freed_before() -> None:
    assert int(printed(CACHE)[0]) >= 14


SECOND = """
def load(size, count):
    with on_huge_pages():
        return [bytearray(b"w" * (size << 10)) for _ in range(count)]
keep_freed_memory()
one = load(256, 128)
del one[::8]
two = load(3 << 10, 12)
print(huge())
assert all(set(part) == {ord("w")} for part in one + two)
"""


@needs_moves
def test_a_second_model_leaves_the_first_where_it_is() -> None:
    """Giving back what was freed between the first one's weights breaks the huge pages around it."""
    assert int(printed(SECOND)[0]) >= 56


def test_a_cache_that_cannot_be() -> None:
    with pytest.raises(MemoryError):
        zeros((1 << 24, 1 << 24))
    assert zeros((0, 3)).shape == (0, 3)
    assert zeros((2, 3)).sum() == 0


def test_never_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    (tmp_path / "hpage_pmd_size").write_text(f"{HUGE}\n")
    monkeypatch.setattr(huge_pages, "SETTINGS", tmp_path)
    monkeypatch.setattr(huge_pages, "_move", None)
    with on_huge_pages():
        pass


def test_without_linux_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "SETTINGS", tmp_path / "missing")
    monkeypatch.setattr(huge_pages, "_move", None)
    with on_huge_pages():
        pass
