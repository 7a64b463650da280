"""What is moved onto huge pages, and what is not."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from dash_export.runtime import huge_pages
from dash_export.runtime.huge_pages import HUGE, added, filled, on_huge_pages, private_memory, whole_pages

MOVES = huge_pages._available() and tuple(map(int, platform.release().split(".")[:2])) >= (6, 1)

SMAPS = """\
55d0c0000000-55d0c0400000 rw-p 00000000 00:00 0                          [heap]
Size:               4096 kB
Rss:                4000 kB
AnonHugePages:         0 kB
VmFlags: rd wr mr mw me ac
7f0000000000-7f0000800000 rw-p 00000000 00:00 0
Rss:                  16 kB
7f0001000000-7f0001400000 r--p 00000000 08:01 1234                       /usr/lib/libonnx.so
Rss:                4096 kB
7f0002000000-7f0002400000 r-xp 00000000 00:00 0
Rss:                4096 kB
7ffc00000000-7ffc00200000 rw-p 00000000 00:00 0                          [stack]
Rss:                2048 kB
"""

PROGRAM = """
import sys
from dash_export.runtime.huge_pages import on_huge_pages
def huge():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("AnonHugePages:"))
mine = bytearray(16 << 20)
before = huge()
with on_huge_pages(sys.argv[1] == "yes"):
    weights = [bytearray(b"w" * (1 << 20)) for _ in range(32)]
print((huge() - before) >> 10, all(item == b"w" * (1 << 20) for item in weights))
"""


def test_only_private_memory_that_may_be_written_counts() -> None:
    found = list(private_memory(SMAPS))
    assert [region for region, _ in found] == [
        (0x55D0C0000000, 0x55D0C0400000),
        (0x7F0000000000, 0x7F0000800000),
    ]
    assert [used >> 10 for _, used in found] == [4000, 16]


def test_what_was_there_before_is_left_alone() -> None:
    assert added([(0, 10)], []) == [(0, 10)]
    assert added([(0, 10)], [(0, 10)]) == []
    assert added([(0, 10), (20, 40)], [(3, 5), (20, 30)]) == [(0, 3), (5, 10), (30, 40)]
    assert added([(0, 10)], [(0, 4), (8, 12)]) == [(4, 8)]


def test_what_was_free_and_is_filled_is_moved_too() -> None:
    """malloc gives what was freed before it asks for more: a region that was there may come to hold the weights."""
    before = [((0, 100), 20), ((200, 1200), 1000), ((2000, 2100), 95)]
    now = [((0, 100), 95), ((200, 1400), 1200), ((2000, 2100), 100), ((3000, 3100), 50), ((4000, 4100), 100)]
    assert filled(now, before) == [(0, 100), (1200, 1400), (4000, 4100)]


def test_whole_pages_lie_inside() -> None:
    assert whole_pages([(1, 3 * HUGE), (HUGE, 2 * HUGE - 1), (5 * HUGE, 7 * HUGE + 9)]) == [
        (HUGE, 3 * HUGE),
        (5 * HUGE, 7 * HUGE),
    ]


def moved(wanted: str) -> tuple[int, bool]:
    """MiB that a process's 32 buffers of 1 MiB brought onto huge pages, and whether they still hold what they held."""
    finished = subprocess.run([sys.executable, "-c", PROGRAM, wanted], capture_output=True, text=True, check=True)
    size, whole = finished.stdout.split()
    return int(size), whole == "True"


@pytest.mark.skipif(not MOVES, reason="this system moves no memory onto huge pages when told to")
def test_small_buffers_come_to_lie_on_huge_pages() -> None:
    size, whole = moved("yes")
    assert size >= 20
    assert whole
    assert moved("no") == (0, True)


def test_never_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]\n")
    monkeypatch.setattr(huge_pages, "SETTING", setting)
    monkeypatch.setattr(huge_pages, "_move", None)
    with on_huge_pages():
        pass


def test_without_linux_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "SETTING", tmp_path / "missing")
    monkeypatch.setattr(huge_pages, "_move", None)
    with on_huge_pages():
        pass
