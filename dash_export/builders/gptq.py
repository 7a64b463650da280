"""GPTQ (Frantar et al., arXiv 2210.17323): round a matrix so that its *product* with what the model really feeds it
changes least, not its weights.

The matrix is rounded input by input; the error that each rounding makes in the product is moved onto the inputs not yet
rounded, as far as the calibration data say that they go together. What comes out is refined, in turn: scales by least
squares for the codes there are, then code by code what is best beside all others (cyclic coordinate descent, as
QuantEase, arXiv 2309.01885, does it).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.graphs.rounded import Rounded

Floats = npt.NDArray[np.float32]

SHRINK = tuple(1 - 0.03 * step for step in range(12))
"""A grid that leaves out a block's extremes is finer for everything else: shares of the range that are tried."""
DAMPING = 0.01
"""Share of the mean squared input that is added to every input's own: what the data have never seen stays bounded."""
REFINEMENTS = 3
"""Turns of refining: together a tenth less squared error (SmolLM2-135M), of which the first turn brings two thirds."""
_COLUMNS = 4096
_STRIDE = 32


def gptq(matrix: Floats, moments: npt.NDArray[np.float64], bits: int, block: int, symmetric: bool) -> Rounded:
    """Round `matrix` [in, out] to `bits` with one scale and zero point per block of `block` inputs and column.

    `moments` [in, in]: sum over calibration tokens of x x^T, x the matrix's input. Grids are fixed first, each block's
    by the squared error weighted with the inputs' mean squares; inputs are then rounded in the order of these, largest
    first (GPTQ's "act-order" with static groups). Columns do not depend on each other. Inputs that no block covers are
    the last, shorter one's.
    """
    rows, columns = matrix.shape
    squares = np.diag(moments).copy()
    mean = squares.mean() if squares.any() else 1.0
    order = np.argsort(-squares, kind="stable")
    damped = moments[np.ix_(order, order)] + np.eye(rows) * (DAMPING * mean)
    curvature = damped.astype(np.float32)
    # The Cholesky factor of the inverse holds, row by row, how an error is shared out among what is left.
    shares = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    weights = (squares / mean + 1e-6).astype(np.float32)
    blocks = -(-rows // block)
    codes = np.empty((rows, columns), np.uint8)
    scales, zeros = np.empty((blocks, columns), np.float32), np.empty((blocks, columns), np.uint8)
    for start in range(0, columns, _COLUMNS):  # the head of a large vocabulary would need gigabytes at once
        part = slice(start, start + _COLUMNS)
        for index in range(blocks):
            inside = slice(index * block, (index + 1) * block)
            scales[index, part], zeros[index, part] = _grid(matrix[inside, part], weights[inside], bits, symmetric)
        wanted, grid = matrix[order, part], order // block
        found = _round(wanted.copy(), shares, scales[grid, part], zeros[grid, part], bits)
        for _ in range(REFINEMENTS):
            steps = found - zeros[grid, part].astype(np.float32)
            scales[:, part] = _refit(steps, scales[:, part], grid, wanted, curvature)
            found = _descend(found, scales[grid, part], zeros[grid, part], wanted, curvature, bits)
        codes[order, part] = found
    return Rounded(codes, scales, zeros, bits, block)


def _grid(values: Floats, weights: Floats, bits: int, symmetric: bool) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """Scale and zero point of one block [block, columns], per column."""
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    low, high = np.minimum(values.min(axis=0), 0), np.maximum(values.max(axis=0), 0)
    whole = 2 * np.maximum(-low, high * middle / (middle - 1)) if symmetric else high - low
    best = np.full(values.shape[1], np.inf, np.float32)
    scale, zero = np.ones_like(best), np.full_like(best, middle)
    for share in SHRINK:
        step = np.where(whole > 0, whole * np.float32(share) / top, 1).astype(np.float32)
        nearest = np.full_like(best, middle) if symmetric else np.rint(-low * np.float32((1 + share) / 2) / step)
        for shift in (0,) if symmetric else (-1, 0, 1):
            offset = np.clip(nearest + np.float32(shift), 0, top)
            error = (np.clip(np.rint(values / step) + offset, 0, top) - offset) * step - values
            squared = weights @ np.square(error)
            better = squared < best
            best = np.where(better, squared, best)
            scale, zero = np.where(better, step, scale), np.where(better, offset, zero)
    return scale, zero.astype(np.uint8)


def _round(left: Floats, shares: Floats, scales: Floats, zeros: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[Any]:
    """Codes of rows in the order given. `left`: what is still to be represented; scales and zeros per row."""
    rows, columns = left.shape
    codes = np.empty(left.shape, np.uint8)
    for start in range(0, rows, _STRIDE):
        stop = min(start + _STRIDE, rows)
        errors = np.empty((stop - start, columns), np.float32)
        for row in range(start, stop):
            zero = zeros[row].astype(np.float32)
            code = np.clip(np.rint(left[row] / scales[row]) + zero, 0, (1 << bits) - 1)
            codes[row] = code
            error = (left[row] - (code - zero) * scales[row]) / shares[row, row]
            left[row + 1 : stop] -= shares[row, row + 1 : stop, None] * error
            errors[row - start] = error
        left[stop:] -= shares[start:stop, stop:].T @ errors
    return codes


def _refit(steps: Floats, scales: Floats, grid: npt.NDArray[np.int64], wanted: Floats, curvature: Floats) -> Floats:
    """The scales [blocks, out] with which `steps` (codes less zero points, [in, out]) come closest to `wanted`, a
    blocks x blocks system per column. `grid`: each row's block.
    """
    blocks, columns = scales.shape
    inside = [np.flatnonzero(grid == index) for index in range(blocks)]
    system, right = np.empty((columns, blocks, blocks)), np.empty((columns, blocks, 1))
    pull = curvature @ wanted
    for index, rows in enumerate(inside):
        product = steps * (curvature[:, rows] @ steps[rows])
        system[:, :, index] = np.stack([product[others].sum(axis=0) for others in inside], axis=1)
        right[:, index, 0] = (steps[rows] * pull[rows]).sum(axis=0)
    diagonal = np.einsum("nbb->nb", system)
    diagonal += 1e-6 * diagonal.mean(axis=1, keepdims=True) + np.finfo(np.float32).tiny
    found = np.linalg.solve(system, right)[..., 0].T
    return np.where(found > 0, found, scales).astype(np.float32)


def _descend(
    codes: npt.NDArray[np.uint8],
    scales: Floats,
    zeros: npt.NDArray[np.uint8],
    wanted: Floats,
    curvature: Floats,
    bits: int,
) -> npt.NDArray[np.uint8]:
    """One pass over all codes, each set to what is best with the others as they are."""
    rows, columns = codes.shape
    codes = codes.copy()
    slope = curvature @ ((codes - zeros.astype(np.float32)) * scales - wanted)
    for start in range(0, rows, _STRIDE):
        stop = min(start + _STRIDE, rows)
        moved = np.empty((stop - start, columns), np.float32)
        for row in range(start, stop):
            best = np.rint(codes[row] - slope[row] / (curvature[row, row] * scales[row]))
            code = np.clip(best, 0, (1 << bits) - 1)
            moved[row - start] = (code - codes[row]) * scales[row]
            codes[row] = code
            slope[row + 1 : stop] += curvature[row + 1 : stop, row, None] * moved[row - start]
        slope[stop:] += curvature[stop:, start:stop] @ moved
    return codes
