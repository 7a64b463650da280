"""What is moved onto huge pages and what is not, and that freed memory that is used again costs no page faults."""

import platform
from contextlib import nullcontext
from pathlib import Path

import pytest

from dash_export import DashRuntime
from dash_export.backends.onnxruntime import huge_pages
from dash_export.backends.onnxruntime.huge_pages import own_memory
from tests.commands.helpers import python

MOVES = huge_pages.available() and tuple(map(int, platform.release().split(".")[:2])) >= (6, 1)
needs_moves = pytest.mark.skipif(not MOVES, reason="this system moves no memory onto huge pages when told to")
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")

PRELUDE = """
import mmap, resource
import numpy as np
from dash_export.backends.onnxruntime.huge_pages import HUGE, keep_freed_memory, on_huge_pages, pages_in_use
def huge():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("AnonHugePages:")) >> 10
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        buffers = [np.ones(size << 18, np.float32) for size in (6, 12, 3)]
        del buffers
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""


def printed(program: str, **variables: str) -> list[int]:
    """The numbers that a process of its own prints; `huge()` in it are its MiB on huge pages."""
    finished = python(PRELUDE + program, **variables)
    assert finished.returncode == 0, finished.stderr
    return [int(word) for word in finished.stdout.split()]


MAPS = """\
55d0c0000000-55d0c0400000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000800000 rw-p 00000000 00:00 0
7f0000800000-7f0000a00000 rw-p 00000000 08:01 1234                       /models/layer.data
7f0000900000-7f0000a00000 rw-p 00000000 00:00 0                          [anon: glibc: malloc]
7f0000a00000-7f0000c00000 rw-s 00000000 00:01 77
7f0001000000-7f0001400000 r--p 00000000 08:01 1234                       /usr/lib/libonnx.so
7f0002000000-7f0002400000 r-xp 00000000 00:00 0
600000000000-602000000000 rw-p 00000000 00:00 0
7ffc00000000-7ffc00200000 rw-p 00000000 00:00 0                          [stack]
"""


def test_only_private_memory_that_may_be_written_counts() -> None:
    assert list(own_memory(MAPS)) == [
        (0x55D0C0000000, 0x55D0C0400000),
        (0x7F0000000000, 0x7F0000800000),
        (0x7F0000900000, 0x7F0000A00000),
    ]


@needs_moves
def test_the_share_in_use() -> None:
    program = """
memory = mmap.mmap(-1, 4 * HUGE, flags=mmap.MAP_PRIVATE)
memory.madvise(mmap.MADV_NOHUGEPAGE)
view = np.frombuffer(memory, np.uint8)
start = -view.ctypes.data % HUGE
for page, share in enumerate((0.4, 0.6)):
    view[start + page * HUGE : start + int((page + share) * HUGE) : mmap.PAGESIZE] = 1
found = pages_in_use()
print(*(round(10 * found.get(view.ctypes.data + start + page * HUGE, 0)) for page in range(3)))
"""
    assert printed(program) == [4, 6, 0]


@needs_moves
def test_what_was_there_before_is_not_moved() -> None:
    """An application's, or what a worker shares with the process it was forked from."""
    program = """
memory = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE)
memory.madvise(mmap.MADV_NOHUGEPAGE)
memory[:] = b"x" * len(memory)
with on_huge_pages(): weights = bytearray(b"w" * (8 << 20))
print(huge())
"""
    assert 4 <= printed(program)[0] <= 16


LOADS = {
    # Weights smaller than a huge page: mapped one by one they would not lie on any, whatever lies between them.
    "small": ("", "[(np.ones(150_000), mmap.mmap(-1, 4 << 20, prot=mmap.PROT_READ)) for _ in range(16)]", 8),
    # As of an application that worked before it loads a model: most of the heap is free, and still there.
    "freed": (
        "work = [bytearray(b'x' * (1 << 18)) for _ in range(256)]; last = bytearray(b'x' * 1000); del work",
        "[bytearray(b'w' * (1 << 18)) for _ in range(128)]",
        24,
    ),
    # And what was freed between a first model's weights does not break the huge pages around it.
    "second": (
        "with on_huge_pages(): one = [bytearray(b'w' * (1 << 18)) for _ in range(128)]\ndel one[::8]",
        "[bytearray(b'w' * (3 << 20)) for _ in range(12)]",
        56,
    ),
}


@needs_moves
@needs_glibc
@pytest.mark.parametrize("name", LOADS)
def test_weights_come_to_lie_on_huge_pages(name: str) -> None:
    before, load, least = LOADS[name]
    program = f"keep_freed_memory()\n{before}\nwith on_huge_pages(): weights = {load}\nprint(huge())"
    assert printed(program)[0] >= least


@needs_glibc
def test_what_is_freed_is_kept() -> None:
    program = "before, kept = faults(), keep_freed_memory(); faults(); print(before, int(kept), faults())"
    before, kept, after = printed(program)
    assert kept
    assert after < before / 10
    assert printed(program, MALLOC_TRIM_THRESHOLD_="131072")[1] == 0


def test_loading_a_runtime_does_both(tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr("dash_export.backends.onnxruntime.ort_engine.keep_freed_memory", lambda: calls.append("heap"))
    monkeypatch.setattr(
        "dash_export.backends.onnxruntime.ort_engine.on_huge_pages",
        lambda wanted: nullcontext(calls.append(f"pages {wanted}")),
    )
    DashRuntime.load(tiny_root, "cpu-fp32")
    assert calls == ["heap", "pages True"]


@pytest.mark.parametrize("enabled", ["always madvise [never]\n", None])
def test_where_there_are_none_nothing_happens(
    enabled: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the administrator's wish, or on other systems than Linux."""
    if enabled is not None:
        (tmp_path / "enabled").write_text(enabled)
        (tmp_path / "hpage_pmd_size").write_text(f"{huge_pages.HUGE}\n")
    monkeypatch.setattr(huge_pages, "SETTINGS", tmp_path)
    monkeypatch.setattr(huge_pages, "pages_in_use", lambda: pytest.fail("looked for"))
    with huge_pages.on_huge_pages():
        pass
