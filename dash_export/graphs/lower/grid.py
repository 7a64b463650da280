"""Matrices of 4-bit codes in CPU engines, not rounded again: a GGUF file's (Q4_0, Q4_1, Q4_K: weight = s q + m in
blocks of 32), or those that were calibrated.

MatMulNBits has integer zero points, so m is split into a multiple of s and a rest. The rests of a matrix are one small
product with the means of x over its blocks; the means are appended to x as further inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dash_export.graphs.lower.rounded import Rounded
from dash_export.graphs.portable.ggml import four_bits
from dash_export.graphs.portable.stored import Stored
from dash_export.models.spec import Float32Array

BLOCK, CODES = 32, 16
_REST_LEVELS = 7


@dataclass(frozen=True)
class Grid:
    """Matrix of 4-bit codes: weight = scale * (code - zero) + rest. Codes are uint8 [out, blocks, block]; scales and
    rests (float32) and zeros (uint8) are [out, blocks].
    """

    codes: npt.NDArray[np.uint8]
    scales: Float32Array
    zeros: npt.NDArray[np.uint8]
    rests: Float32Array

    def has_rests(self) -> bool:
        return bool((np.abs(self.rests) > 1e-3 * np.abs(self.scales)).any())

    def times(self, factor: float) -> Grid:
        return replace(self, scales=self.scales * np.float32(factor), rests=self.rests * np.float32(factor))


def grid_of(stored: Stored) -> Grid | None:
    """Return the grid of a matrix's blocks. None for a type that is not of four bits, and for a matrix with a rest
    above one step: where all weights of a block lie on one side of zero, rests would be coarse.
    """
    parts = four_bits(stored.kind, *stored.read())
    if parts is None:
        return None
    codes, scales, least = parts
    steps = np.where(scales == 0, np.float32(1), scales)
    zeros = np.clip(np.rint(-least / steps), 0, CODES - 1)
    rests = least + zeros.astype(np.float32) * scales
    if (np.abs(rests) > np.abs(steps)).any():
        return None
    return Grid(codes, scales, zeros.astype(np.uint8), rests)


def grid_from(rounded: Rounded) -> Grid:
    """Return the grid of a calibrated matrix; it has no rests. A last, shorter block is filled up."""
    short = len(rounded.scales) * rounded.block - len(rounded.codes)
    codes = np.pad(rounded.codes, ((0, short), (0, 0))).T.reshape(rounded.codes.shape[1], -1, rounded.block)
    return Grid(codes, rounded.scales.T, rounded.zeros.T, np.zeros_like(rounded.scales.T))


def packed(grids: Sequence[Grid]) -> tuple[npt.NDArray[np.uint8], Float32Array, npt.NDArray[np.uint8], int]:
    """Pack grids side by side for MatMulNBits: codes [out, blocks, block / 2], scales, zero points, and the number of
    inputs to append to the matrix's own: one per block for the rests, which get blocks of their own; 0 without rests.
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
