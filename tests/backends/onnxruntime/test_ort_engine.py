"""ONNX Runtime on a CPU: how its sessions are made, and bound to memory of another shape."""

import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import onnx
import pytest

from dash_export.backends.onnxruntime import ort_engine
from dash_export.backends.onnxruntime.ort_engine import check_heads, fitted_shape, start_thread_pool
from dash_export.errors import BackendError


@pytest.mark.parametrize(
    ("shape", "expected", "found"),
    [
        ((1, 5, 576), ["batch", "sequence", 576], (1, 5, 576)),
        ((3, 4, 2), ["rows", 2], (12, 2)),
        ((3, 4), [1, "rows"], (1, 12)),
        ((1,), [1], (1,)),
        ((1, 1152), ["rows", 576], None),
        ((1, 5, 575), ["batch", "sequence", 576], None),
        ((3, 4), [2, "rows"], None),
        ((4,), ["rows", 4], None),
        ((2, 3), [3, 2], None),
        ((2, 3, 4), ["batch", "sequence"], None),
    ],
)
def test_the_same_memory_in_the_shape_that_a_graph_wants(
    shape: tuple[int, ...], expected: list[int | str], found: tuple[int, ...] | None
) -> None:
    assert fitted_shape(shape, expected) == found


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """No telemetry; attention scores whole, on x86, unless the user says otherwise."""
    code = (
        "import os, platform, dash_export.backends.onnxruntime.ort_engine\n"
        "x86 = platform.machine().lower() in ('x86_64', 'amd64')\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'], os.environ.get('ORT_GQA_DISABLE_FLASH_ATTENTION', '1' * (not x86)))"
    )
    for given in ("1", "0"):
        monkeypatch.setenv("ORT_GQA_DISABLE_FLASH_ATTENTION", given)
        assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["1", given]
    monkeypatch.delenv("ORT_GQA_DISABLE_FLASH_ATTENTION")
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["1", "1"]


def test_more_threads_than_processors_are_cut(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ort_engine, "_pool_threads", None)
    monkeypatch.setattr(ort_engine, "allowed_processors", lambda: {0, 1})
    monkeypatch.setattr(ort_engine.ort, "set_global_thread_pool_sizes", begun := Mock())
    assert start_thread_pool(1024) == 2
    begun.assert_called_once_with(2, 1)
    assert caplog.messages == ["1024 threads on 2 processors would wait for each other: 2 are taken"]
    caplog.clear()
    assert start_thread_pool(2) == 2
    assert not caplog.messages


@pytest.mark.parametrize(("name", "count", "good"), [
    ("num_heads", 9, True), ("kv_num_heads", 1, True), ("q_num_heads", 300, True), ("num_heads", 0, False),
    ("kv_num_heads", 1 << 32, False), ("num_heads", -1, False), ("kv_num_heads", 1 << 14, False),
])  # fmt: skip
def test_numbers_of_heads(name: str, count: int, good: bool, tmp_path: Path) -> None:
    """ONNX Runtime cuts them to 32 bits and divides: 1 << 32 ends the process."""
    node = onnx.helper.make_node("GroupQueryAttention", ["a"], ["b"], **{name: count}).SerializeToString()
    path = tmp_path / "a.onnx"
    path.write_bytes(node)
    if good:
        check_heads(path)
        attribute = onnx.helper.make_attribute(name, count).SerializeToString()
        # The last value of a field counts.
        path.write_bytes(b"\x2a" + bytes([len(attribute) + 6]) + attribute + b"\x18\x80\x80\x80\x80\x10")
    with pytest.raises(BackendError, match="of no heads"):
        check_heads(path)
