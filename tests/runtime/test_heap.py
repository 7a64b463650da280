"""Freed memory that is used again costs no page faults."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dash_export import DashRuntime
from dash_export.runtime import heap
from dash_export.runtime.backends.onnxruntime import OrtBackend, OrtEngine
from tests.commands.helpers import python
from tests.runtime.test_huge_pages import needs_moves, printed

needs_glibc = pytest.mark.skipif(
    heap._glibc() is None, reason="not glibc, or the environment says what malloc shall do"
)

FAULTS = """
import resource, sys
import numpy as np
from dash_export.runtime.heap import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        buffers = [np.ones(size << 18, np.float32) for size in (6, 12, 3)]
        del buffers
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before, kept = faults(), keep_freed_memory()
faults()
print(before, int(kept), faults())
"""


SCATTERED = """
import mmap
before, kept = huge(), keep_freed_memory()
with on_huge_pages():
    made = [(np.ones(150_000), mmap.mmap(-1, 4 << 20, prot=mmap.PROT_READ)) for _ in range(16)]
print(huge() - before, kept)
"""


def measured(**variables: str) -> tuple[int, bool, int]:
    before, kept, after = map(int, python(FAULTS, **variables).stdout.split())
    return before, bool(kept), after


@needs_glibc
def test_what_is_freed_is_kept() -> None:
    before, kept, after = measured()
    assert kept
    assert after < before / 10


def test_loading_says_so_first(tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And moves what it loads, and nothing else."""
    calls: list[object] = []
    load = OrtBackend.load

    @contextmanager
    def on_huge_pages(wanted: bool) -> Iterator[None]:
        calls.append(wanted)
        yield
        calls.append("moved")

    def noted(self: OrtBackend, path: Path) -> OrtEngine:
        calls.append("engine")
        return load(self, path)

    monkeypatch.setattr("dash_export.runtime.runtime.keep_freed_memory", lambda: calls.append("heap"))
    monkeypatch.setattr("dash_export.runtime.runtime.on_huge_pages", on_huge_pages)
    monkeypatch.setattr(OrtBackend, "load", noted)
    DashRuntime.load(tiny_root, "cpu-fp32")
    assert calls[:2] == ["heap", True]
    assert set(calls[2:-1]) == {"engine"}
    assert calls[-1] == "moved"


@needs_moves
@needs_glibc
def test_weights_smaller_than_a_huge_page_come_to_lie_on_them() -> None:
    """Mapped one by one they would not, whatever lies between them."""
    huge, kept = printed(SCATTERED)
    assert kept == "True"
    assert int(huge) >= 8


def test_the_environment_has_the_last_word() -> None:
    assert not measured(MALLOC_TRIM_THRESHOLD_="131072")[1]
