"""What the processor has, as the kernel tells it."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from dash_export.runtime import cpus
from dash_export.runtime.cpus import LoadMeter, saturates_int8


@pytest.mark.parametrize(
    ("machine", "told", "overflows"),
    [
        ("x86_64", "flags\t\t: fpu avx2 avx512f\n", True),
        ("x86_64", "processor: 0\nflags\t: fpu avx512_vnni sse\n", False),
        ("AMD64", "flags\t: avx_vnni\n", False),
        ("x86_64", "nothing of the kind", True),
        ("x86_64", None, True),
        ("aarch64", "Features\t: asimd asimddp\n", False),
        ("arm64", None, False),
    ],
)
def test_where_sums_of_int8_products_overflow(
    machine: str, told: str | None, overflows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x86 without VNNI, and where nobody tells."""

    def read(*_: object, **__: object) -> str:
        if told is None:
            raise FileNotFoundError
        return told

    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(Path, "read_text", read)
    assert saturates_int8() == overflows


def test_what_others_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds, of which others work 1.5 processor seconds and this process 0.5; the host keeps 0.4."""
    ticks = iter(["cpu  100 0 50 900 0 0 0 10 0 0\ncpu0 1", "cpu  270 0 80 1000 0 0 0 50 0 0\ncpu0 1"])
    clock, own = iter([5.0, 7.0]), iter([1.0, 1.5])
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: next(ticks))
    monkeypatch.setattr(cpus.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(cpus.time, "process_time", lambda: next(own))
    monkeypatch.setattr(cpus.os, "sysconf", lambda _: 100)
    assert LoadMeter().load() == (0.75, 0.2)
