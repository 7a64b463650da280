"""MatMul -> MatMulNBits and Gather -> GatherBlockQuantized, with ONNX Runtime's own block quantiser."""

from __future__ import annotations

from collections.abc import Collection
from itertools import takewhile
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

from dash_export.graphs.rounded import Rounded, Roundings, to_nearest, weight_precision
from dash_export.graphs.surgery import add_constant, constant_value, drop_unused, only_user, replace
from dash_export.models.spec import Float32Array
from dash_export.targets import WeightsRecipe

CONTRIB = "com.microsoft"
BITS = {"int8": 8, "int4": 4}
# Activations are quantised to int8 per block: the fast kernels on AVX2, AVX-512-VNNI and NEON.
ACCURACY_LEVEL = 4


def quantize_block(matrix: Float32Array, bits: int, block: int, symmetric: bool) -> tuple[npt.NDArray[Any], ...]:
    """[in, out] float32 -> packed [out, blocks, block * bits / 8] uint8, scales [out, blocks] float32, zero points
    (packed, uint8).
    """
    config = DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=symmetric, bits=bits)
    packed, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(matrix)
    out = matrix.shape[1]
    return packed, scales.reshape(out, -1), zeros.reshape(out, -1)


def pack(rounded: Rounded) -> tuple[npt.NDArray[Any], ...]:
    """As `quantize_block` gives it."""
    rows, out = rounded.codes.shape
    blocks = len(rounded.scales)
    codes = np.zeros((out, blocks * rounded.block), np.uint8)
    codes[:, :rows] = rounded.codes.T
    zeros = np.full((out, blocks + blocks % 2), 8, np.uint8)
    zeros[:, :blocks] = rounded.zeros.T
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).reshape(out, blocks, -1)
    return packed, np.ascontiguousarray(rounded.scales.T), zeros[:, ::2] | zeros[:, 1::2] << 4


def quantize_weights(
    graph: ir.Graph,
    recipe: WeightsRecipe,
    gated: Collection[int],
    roundings: Roundings = to_nearest,
) -> None:
    """Quantise every weight matrix at the precision its part of the model has in the recipe."""
    for node in list(graph):
        if node.op_type == "MatMul":
            precision = weight_precision(str(node.name), recipe, gated)
            matrix = constant_value(node.inputs[1])
            if precision in BITS and matrix is not None and _is_weight(matrix, recipe.block_size):
                _matmul(graph, node, matrix, BITS[precision], recipe, roundings)
        elif node.op_type == "Gather" and node.name == "embed" and recipe.embedding in BITS:
            _embedding(graph, node, BITS[recipe.embedding], recipe)
    drop_unused(graph)


def _is_weight(matrix: npt.NDArray[Any], block: int) -> bool:
    # Not the policy's few columns.
    return matrix.ndim == 2 and min(matrix.shape) >= block


def _quantized(
    node: str, matrix: Float32Array, bits: int, recipe: WeightsRecipe, roundings: Roundings
) -> tuple[npt.NDArray[Any], ...]:
    """As `quantize_block` gives it. Of the matrices packed into this one, the first ones may have a rounding of their
    own; the others are rounded to nearest.
    """
    part, _, names = node.rpartition("/")
    rounded = (roundings(f"{part}/{name}") if bits == 4 else None for name in names.split("+"))
    own = [item for item in takewhile(lambda item: item is not None, rounded) if item is not None]
    for item in own:
        item.check(node, (len(matrix), item.codes.shape[1]), recipe.block_size)
    rest = np.ascontiguousarray(matrix[:, sum(item.codes.shape[1] for item in own) :])
    pieces = [pack(item) for item in own]
    if rest.size:
        pieces.append(quantize_block(rest, bits, recipe.block_size, recipe.symmetric))
    return tuple(np.concatenate(arrays) for arrays in zip(*pieces, strict=True))


def _matmul(
    graph: ir.Graph, node: ir.Node, matrix: Float32Array, bits: int, recipe: WeightsRecipe, roundings: Roundings
) -> None:
    """MatMul -> MatMulNBits, which takes over a constant that is added to it if there is one."""
    source, weight = node.inputs
    assert weight is not None
    packed, scales, zeros = _quantized(str(node.name), matrix, bits, recipe, roundings)
    inputs: list[ir.Value | None] = [
        source,
        add_constant(graph, f"{weight.name}.q{bits}", packed),
        add_constant(graph, f"{weight.name}.scales", scales),
        None if recipe.symmetric else add_constant(graph, f"{weight.name}.zero_points", zeros),
    ]
    attributes = {
        "K": matrix.shape[0],
        "N": matrix.shape[1],
        "bits": bits,
        "block_size": recipe.block_size,
        "accuracy_level": ACCURACY_LEVEL,
    }
    add = only_user(node)
    constant = add is not None and add.op_type == "Add" and constant_value(add.inputs[1]) is not None
    bias = add.inputs[1] if add is not None and constant else None
    with_bias = inputs if bias is None else [*inputs, None, bias]
    new = ir.node("MatMulNBits", with_bias, attributes, domain=CONTRIB, name=node.name)
    if add is not None and bias is not None:
        replace(graph, add, new)
        graph.remove(node, safe=True)
    else:
        replace(graph, node, new)


def _embedding(graph: ir.Graph, node: ir.Node, bits: int, recipe: WeightsRecipe) -> None:
    weight, indices = node.inputs
    table = constant_value(weight)
    assert table is not None
    assert weight is not None
    # The quantiser blocks the first axis of [in, out]: rows of the table are columns there.
    packed, scales, zeros = quantize_block(np.ascontiguousarray(table.T), bits, recipe.block_size, recipe.symmetric)
    inputs = [
        add_constant(graph, f"{weight.name}.q{bits}", packed.reshape(table.shape[0], -1)),
        indices,
        add_constant(graph, f"{weight.name}.scales", scales),
    ]
    if not recipe.symmetric:
        inputs.append(add_constant(graph, f"{weight.name}.zero_points", zeros))
    attributes = {"bits": bits, "block_size": recipe.block_size, "gather_axis": 0, "quantize_axis": 1}
    replace(graph, node, ir.node("GatherBlockQuantized", inputs, attributes, domain=CONTRIB, name=node.name))
