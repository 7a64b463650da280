"""Codes of a GGUF file found again in its weights, which are s q + m in blocks of 32 (Q4_0, Q4_1, Q4_K): a CPU engine
takes them without a second rounding, whatever wrote them.

MatMulNBits has whole zero points, so m is a multiple of s plus a rest. The rests of a matrix are one small product with
the means of x over its blocks, which stand behind x as further inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.models.spec import Float32Array

BLOCK, CODES = 32, 16
_CLOSE = 4e-6
"""Rounding of s q + m in float32, as a share of a block's largest weight."""
_ROWS = 1 << 13
_REST_LEVELS = 7


@dataclass(frozen=True)
class Grid:
    """weight = scale * (code - zero) + rest: codes uint8 [out, blocks, BLOCK], the others [out, blocks]; scales and
    rests are float32, zeros uint8.
    """

    codes: npt.NDArray[np.uint8]
    scales: Float32Array
    zeros: npt.NDArray[np.uint8]
    rests: Float32Array

    def has_rests(self) -> bool:
        return bool((np.abs(self.rests) > 1e-3 * self.scales).any())


def on_grid(matrix: Float32Array) -> Grid | None:
    """The grid that the weights [in, out] lie on; None where there is none of 16 levels a block."""
    rows, out = matrix.shape
    if rows % BLOCK:
        return None
    parts = []
    for start in range(0, out, _ROWS):
        part = _found(np.ascontiguousarray(matrix[:, start : start + _ROWS].T).reshape(-1, rows // BLOCK, BLOCK))
        if part is None:
            return None
        parts.append(part)
    codes, scales, least = (np.concatenate(column) for column in zip(*parts, strict=True))
    # Where the lowest levels are not used the least weight lies above zero: its code is not 0.
    lowest = np.clip(np.rint(least / scales), 0, CODES - 1 - codes.max(-1)).astype(np.uint8)
    codes, least = codes + lowest[..., None], least - lowest * scales
    zeros = np.clip(np.rint(-least / scales), 0, CODES - 1)
    if (np.abs(least + zeros * scales) > scales).any():  # weights all on one side of zero: rests would be coarse
        return None
    return Grid(codes, scales, zeros.astype(np.uint8), least + zeros.astype(np.float32) * scales)


def _found(weights: Float32Array) -> tuple[Any, ...] | None:
    """weights [..., BLOCK] -> (codes, steps, least weights)."""
    least, most = weights.min(-1), weights.max(-1)
    close = _CLOSE * np.maximum(np.abs(least), np.abs(most)) + np.float32(1e-30)
    gaps = np.diff(np.sort(weights, -1), axis=-1)
    gaps[gaps <= 2 * close[..., None]] = np.inf
    gap = gaps.min(-1)
    steps, codes = np.ones_like(least), np.zeros(weights.shape, np.uint8)
    open_ = np.isfinite(gap)
    for parts in range(1, 8):  # neighbouring levels may be missing
        at = np.nonzero(open_)
        if not len(at[0]):
            break
        span = most[at] - least[at]
        levels = np.rint(span * parts / gap[at])
        step = span / np.maximum(levels, 1)
        code = np.rint((weights[at] - least[at][:, None]) / step[:, None])
        wrong = np.abs(least[at][:, None] + code * step[:, None] - weights[at]).max(-1) > close[at]
        good = tuple(index[~wrong & (levels < CODES)] for index in at)
        steps[good], codes[good] = step[~wrong & (levels < CODES)], code[~wrong & (levels < CODES)]
        open_[good] = False
    return None if open_.any() else (codes, steps, least)


def packed(grids: Sequence[Grid]) -> tuple[npt.NDArray[np.uint8], Float32Array, npt.NDArray[np.uint8], int]:
    """Grids side by side as MatMulNBits takes them: codes [out, blocks, BLOCK / 2], scales, zero points, and how many
    inputs follow those of the matrix: one per block for the rests, which take blocks of their own; or none.
    """
    codes, scales, zeros, rests = (
        np.concatenate([getattr(grid, name) for grid in grids]) for name in ("codes", "scales", "zeros", "rests")
    )
    more = 0
    if any(grid.has_rests() for grid in grids):
        more = rests.shape[1]
        extra = np.zeros((len(rests), -(-more // BLOCK) * BLOCK), np.float32)
        extra[:, :more] = BLOCK * rests
        extra = extra.reshape(len(rests), -1, BLOCK)
        step = np.maximum(np.abs(extra).max(-1) / _REST_LEVELS, np.float32(1e-30))
        codes = np.concatenate([codes, (np.rint(extra / step[..., None]) + 8).astype(np.uint8)], axis=1)
        scales = np.concatenate([scales, step], axis=1)
        zeros = np.concatenate([zeros, np.full(step.shape, 8, np.uint8)], axis=1)
    zeros = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)), constant_values=8)
    return codes[..., ::2] | codes[..., 1::2] << 4, scales, zeros[:, ::2] | zeros[:, 1::2] << 4, more
