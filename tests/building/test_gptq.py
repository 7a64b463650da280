"""GPTQ against rounding to nearest."""

import numpy as np
import pytest

from dash_export.building import gptq as module
from dash_export.building.gptq import gptq
from dash_export.graphs.lower.grid import grid_from, packed
from dash_export.graphs.lower.ort_products import quantize_block
from dash_export.graphs.lower.rounded import Rounded

ROWS, COLUMNS, BLOCK = 96, 40, 32
Arrays = tuple[np.ndarray, ...]


@pytest.fixture(scope="module")
def case() -> Arrays:
    """Inputs of low rank plus noise, a few of them much larger; a matrix."""
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((2000, 12)) @ rng.standard_normal((12, ROWS))
    inputs = mixed + 0.3 * rng.standard_normal((2000, ROWS))
    inputs[:, [5, 50]] *= 20
    return inputs.astype(np.float32), rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)


def moments(inputs: np.ndarray) -> np.ndarray:
    return inputs.astype(np.float64).T @ inputs


def nearest(matrix: np.ndarray) -> Rounded:
    packed, scales, zeros = quantize_block(matrix, 4, BLOCK, False)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(matrix.shape[1], -1).T
    offsets = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(matrix.shape[1], -1)[:, : len(matrix) // BLOCK].T
    return Rounded(codes, np.ascontiguousarray(scales.T), offsets, BLOCK)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_product_is_closer_than_with_nearest_weights(case: Arrays, symmetric: bool) -> None:
    inputs, matrix = case

    def error(rounded: Rounded) -> float:
        return float(np.square(inputs @ (rounded.dequantized() - matrix)).mean())

    rounded = gptq(matrix, moments(inputs), BLOCK, symmetric)
    assert error(rounded) < 0.4 * error(nearest(matrix))
    assert not symmetric or (rounded.zeros == 8).all()


def test_few_columns_at_a_time_give_the_same(case: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, matrix = case
    whole = gptq(matrix, moments(inputs), BLOCK, False)
    monkeypatch.setattr(module, "_SYSTEM_BYTES", 8 * 3**2 * 7)
    np.testing.assert_array_equal(gptq(matrix, moments(inputs), BLOCK, False).codes, whole.codes)


def test_odd_matrices(case: Arrays) -> None:
    inputs, matrix = case[0], case[1].copy()
    unknown = gptq(matrix, np.zeros((ROWS, ROWS)), BLOCK, False).dequantized()
    assert np.square(unknown - matrix).mean() < 1.1 * np.square(nearest(matrix).dequantized() - matrix).mean()
    matrix[:, 3] = 0
    matrix[:BLOCK, 5] = 0
    found = gptq(matrix, moments(inputs), BLOCK, False).dequantized()
    assert np.isfinite(found).all()
    assert not found[:, 3].any()
    short = gptq(matrix[:80], moments(inputs[:, :80]), BLOCK, False)
    *parts, _ = packed([grid_from(short)])
    assert [part.shape for part in parts] == [(COLUMNS, 3, BLOCK // 2), (COLUMNS, 3), (COLUMNS, 2)]


def test_packing_is_what_onnx_runtime_packs(case: Arrays) -> None:
    *parts, _ = packed([grid_from(nearest(case[1]))])
    for found, wanted in zip(parts, quantize_block(case[1], 4, BLOCK, False), strict=True):
        np.testing.assert_array_equal(found, wanted)
