"""Matrices as MatMulNBits takes them: by ONNX Runtime's own block quantiser, or with codes that were calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

from dash_export.graphs.rounded import Rounded, Roundings
from dash_export.models.spec import Float32Array
from dash_export.targets import WeightsRecipe

CONTRIB = "com.microsoft"
ACCURACY_LEVEL = 4
"""Activations are quantised to int8 per block: the fast kernels on AVX2, AVX-512-VNNI and NEON."""

Blocks = tuple[npt.NDArray[Any], npt.NDArray[np.float32], npt.NDArray[Any]]
"""Packed codes [out, blocks, block * bits / 8] uint8, scales [out, blocks] float32, zero points (packed, uint8)."""


def quantize_block(matrix: Float32Array, bits: int, block: int, symmetric: bool) -> Blocks:
    """Quantise [in, out] float32 in blocks, each weight rounded to nearest."""
    config = DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=symmetric, bits=bits)
    packed, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(matrix)
    out = matrix.shape[1]
    return packed, scales.reshape(out, -1), zeros.reshape(out, -1)


def pack_rounded(rounded: Rounded, times: float = 1.0) -> Blocks:
    """Pack a calibrated matrix times a factor: its codes stay, its scales are multiplied."""
    rows, out = rounded.codes.shape
    blocks = len(rounded.scales)
    codes = np.zeros((out, blocks * rounded.block), np.uint8)
    codes[:, :rows] = rounded.codes.T
    zeros = np.full((out, blocks + blocks % 2), 8, np.uint8)
    zeros[:, :blocks] = rounded.zeros.T
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).reshape(out, blocks, -1)
    scales = np.ascontiguousarray(rounded.scales.T) * np.float32(times)
    return packed, scales, zeros[:, ::2] | zeros[:, 1::2] << 4


def quantized(
    node: str,
    matrices: Sequence[Float32Array],
    bits: int,
    recipe: WeightsRecipe,
    roundings: Roundings,
    first_times: float = 1.0,
) -> Blocks:
    """Quantise the matrices of a node `part/name+name` side by side. `first_times`: the factor that the first matrix
    was multiplied by.
    """
    part, _, names = node.rpartition("/")
    calibrated = [roundings(f"{part}/{name}") if bits == 4 else None for name in names.split("+")]
    pieces = []
    for index, (rounded, matrix) in enumerate(zip(calibrated, matrices, strict=True)):
        if isinstance(rounded, Rounded):
            rounded.check(node, matrix.shape, recipe.block_size)
            pieces.append(pack_rounded(rounded, first_times if index == 0 else 1.0))
    if len(pieces) < len(matrices):
        wide = np.concatenate(matrices, axis=1) if len(matrices) > 1 else matrices[0]
        pieces = [quantize_block(np.ascontiguousarray(wide), bits, recipe.block_size, recipe.symmetric)]
    packed, scales, zeros = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    return packed, scales, zeros
