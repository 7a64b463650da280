"""What the processor has, as the kernel tells it."""

from pathlib import Path

import pytest

from dash_export.backends.host import cpus
from dash_export.backends.host.cpus import LoadMeter, has_bfloat16


def test_what_others_take(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(["cpu  100 0 50 900 0 0 0 10 0 0\ncpu0 1", "cpu  270 0 80 1000 0 0 0 50 0 0\ncpu0 1"])
    clock, own = iter([5.0, 7.0]), iter([1.0, 1.5])
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: next(ticks))
    monkeypatch.setattr(cpus.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(cpus.time, "process_time", lambda: next(own))
    monkeypatch.setattr(cpus.os, "sysconf", lambda _: 100)
    assert LoadMeter().load() == (0.75, 0.2)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("flags\t\t: fpu avx512f avx512_vnni avx512_bf16", True),
        ("flags: sse2 amx_bf16 amx_tile", True),
        ("Features : fp asimd i8mm bf16", True),
        ("flags: fpu avx2 avx512f avx512_vnni", False),
        ("Features: fp asimd", False),
    ],
)
def test_bfloat16(line: str, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"processor: 0\n{line}\n")
    assert has_bfloat16() == found


def test_the_limits_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of four cores, and of 2 GiB what is used, but for files, is gone; a group around it allows less."""
    inner = tmp_path / "kubepods" / "pod"
    inner.mkdir(parents=True)
    monkeypatch.setattr(cpus, "_GROUPS", tmp_path)
    monkeypatch.setattr(cpus, "_proc", lambda name, *_: ":/kubepods/pod" if name == "self/cgroup" else "99999999 kB")
    monkeypatch.setattr(cpus, "physical_cores", lambda: 4)
    assert (cpus.usable_cores(), cpus.available_memory()) == (4, 99999999 * 1024)
    (inner / "cpu.max").write_text("250000 100000\n")
    (inner / "memory.max").write_text("max\n")
    assert (cpus.usable_cores(), cpus.available_memory()) == (2, 99999999 * 1024)
    (inner.parent / "cpu.max").write_text("50000 100000\n")
    (inner.parent / "memory.max").write_text(f"{2 << 30}\n")
    (inner.parent / "memory.current").write_text(f"{1 << 30}\n")
    (inner.parent / "memory.stat").write_text("anon 5\ninactive_file 1000\nactive_file 7\n")
    assert (cpus.usable_cores(), cpus.available_memory()) == (1, (1 << 30) + 1007)
