"""What the processor has, as the kernel tells it."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from dash_export.runtime.cpus import saturates_int8


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
