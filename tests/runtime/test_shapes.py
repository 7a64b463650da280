"""The same memory in the shape that a graph wants, and no other."""

from __future__ import annotations

import pytest

from dash_export.runtime.backends.onnxruntime import _fitted


@pytest.mark.parametrize(
    ("shape", "expected", "fitted"),
    [
        ((1, 5, 576), ["batch", "sequence", 576], (1, 5, 576)),
        ((3, 1, 2), ["rows", 2], (3, 2)),
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
def test_fitted(shape: tuple[int, ...], expected: list[int | str], fitted: tuple[int, ...] | None) -> None:
    assert _fitted(shape, expected) == fitted
