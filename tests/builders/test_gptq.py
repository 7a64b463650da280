"""GPTQ against rounding to nearest, on inputs that go together as a model's do."""

from __future__ import annotations

import numpy as np
import pytest

from dash_export.builders import gptq as gptq_module
from dash_export.builders.gptq import gptq
from dash_export.graphs.ort.quantize import pack, quantize_block
from dash_export.graphs.rounded import Rounded

ROWS, COLUMNS, BLOCK = 96, 40, 32


@pytest.fixture(scope="module")
def case() -> tuple[np.ndarray, np.ndarray]:
    """Inputs of low rank plus noise, a few of them much larger; a matrix."""
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((2000, 12)) @ rng.standard_normal((12, ROWS))
    inputs = mixed + 0.3 * rng.standard_normal((2000, ROWS))
    inputs[:, [5, 50]] *= 20
    return inputs.astype(np.float32), rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)


def moments(inputs: np.ndarray) -> np.ndarray:
    return inputs.astype(np.float64).T @ inputs


def nearest(matrix: np.ndarray, bits: int = 4) -> np.ndarray:
    """ONNX Runtime's own rounding, as float32."""
    packed, scales, zeros = quantize_block(matrix, bits, BLOCK, False)
    blocks = len(matrix) // BLOCK
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(matrix.shape[1], -1).T
    offsets = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(matrix.shape[1], -1)[:, :blocks].T
    return Rounded(codes, np.ascontiguousarray(scales.T), offsets, bits, BLOCK).dequantized()


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_product_is_closer_than_with_nearest_weights(case: tuple[np.ndarray, np.ndarray], symmetric: bool) -> None:
    inputs, matrix = case
    rounded = gptq(matrix, moments(inputs), 4, BLOCK, symmetric)
    errors = [np.square(inputs @ (other - matrix)).mean() for other in (rounded.dequantized(), nearest(matrix))]
    assert errors[0] < 0.4 * errors[1]
    assert not symmetric or (rounded.zeros == 8).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_refining_brings_the_product_closer(
    case: tuple[np.ndarray, np.ndarray], symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, matrix = case
    errors = []
    for turns in (0, 1, 3):
        monkeypatch.setattr(gptq_module, "REFINEMENTS", turns)
        rounded = gptq(matrix, moments(inputs), 4, BLOCK, symmetric)
        errors.append(np.square(inputs @ (rounded.dequantized() - matrix)).mean())
    assert errors[2] < errors[1] < 0.97 * errors[0]


def test_a_column_of_zeros_stays_one(case: tuple[np.ndarray, np.ndarray]) -> None:
    inputs, matrix = case
    matrix = matrix.copy()
    matrix[:, 3] = 0
    matrix[:BLOCK, 5] = 0
    found = gptq(matrix, moments(inputs), 4, BLOCK, False).dequantized()
    assert np.isfinite(found).all()
    assert not found[:, 3].any()


def test_without_knowledge_of_inputs_it_is_close_to_the_weights(case: tuple[np.ndarray, np.ndarray]) -> None:
    matrix = case[1]
    rounded = gptq(matrix, np.zeros((ROWS, ROWS)), 4, BLOCK, False)
    assert np.square(rounded.dequantized() - matrix).mean() < 1.1 * np.square(nearest(matrix) - matrix).mean()


def test_a_last_short_block_has_its_own_grid(case: tuple[np.ndarray, np.ndarray]) -> None:
    inputs, matrix = case
    rounded = gptq(matrix[:80], moments(inputs[:, :80]), 4, BLOCK, False)
    assert rounded.scales.shape == (3, COLUMNS)
    packed, scales, zeros = pack(rounded)
    assert packed.shape == (COLUMNS, 3, BLOCK // 2)
    assert scales.shape == (COLUMNS, 3)
    assert zeros.shape == (COLUMNS, 2)


def test_packing_is_what_onnx_runtime_packs(case: tuple[np.ndarray, np.ndarray]) -> None:
    matrix = case[1]
    expected = quantize_block(matrix, 4, BLOCK, False)
    blocks = ROWS // BLOCK
    codes = np.stack([expected[0] & 15, expected[0] >> 4], axis=-1).reshape(COLUMNS, -1).T
    zeros = np.stack([expected[2] & 15, expected[2] >> 4], axis=-1).reshape(COLUMNS, -1)[:, :blocks].T
    rounded = Rounded(codes, np.ascontiguousarray(expected[1].T), zeros, 4, BLOCK)
    for found, wanted in zip(pack(rounded), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
