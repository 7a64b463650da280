"""Freed memory that is used again costs no page faults."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dash_export import DashRuntime
from tests.commands.helpers import python

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


def measured(**variables: str) -> tuple[int, bool, int]:
    before, kept, after = map(int, python(FAULTS, **variables).stdout.split())
    return before, bool(kept), after


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is told so on Linux only")
def test_what_is_freed_is_kept() -> None:
    before, kept, after = measured()
    if not kept:
        pytest.skip("not glibc, or its refusal")
    assert after < before / 10


def test_loading_says_so(tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr("dash_export.runtime.runtime.keep_freed_memory", lambda: calls.append(True))
    DashRuntime.load(tiny_root, "cpu-fp32")
    assert calls


def test_the_environment_has_the_last_word() -> None:
    assert not measured(MALLOC_TRIM_THRESHOLD_="131072")[1]
