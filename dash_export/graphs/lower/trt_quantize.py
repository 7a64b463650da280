"""Quantisation as TensorRT reads it: DequantizeLinear before MatMul, symmetric.

int4 has one scale per column and block of `block_size` rows, int8 one per column (not every TensorRT 10 has blocks of
int8). Both quantise only weights, which stay small in the engine: 481 kB for a 576 x 1536 matrix at int4, built by
TensorRT-RTX 1.7. fp8 (E4M3) quantises both factors of a product: it has one scale per column, and one for the matrix's
input. These scales are powers of two, which 16 bits hold: a float rounds the same at any of them.
"""

from collections.abc import Collection

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dash_export.bundle.recipe import QUANTISED, WeightsRecipe
from dash_export.errors import BundleError
from dash_export.graphs.lower.rounded import Rounded, Roundings, block_of, weight_precision
from dash_export.graphs.lower.surgery import constant_value
from dash_export.graphs.lower.trt_decompose import Chain
from dash_export.models.spec import Float32Array

MIDDLE = np.int8(8)
"""Code of zero on a symmetric 4-bit grid."""
_COLUMNS = 4096
_SMALLEST = np.float32(2.0**-24)
"""Smallest value of float16, in which a scale may be stored: TensorRT refuses a scale of 0."""


def quantize_symmetric(matrix: Float32Array, bits: int, block: int) -> tuple[npt.NDArray[np.int8], Float32Array]:
    """Quantise [in, out] float32 to values [in, out] int8 in [-2^(bits-1), 2^(bits-1)) and scales [in / block, out]
    float32 > 0, in float16 too: weight = value * scale. A block's largest weight is just within the range.
    """
    (rows, columns), high = matrix.shape, (1 << (bits - 1)) - 1
    values, scales = np.empty((rows, columns), np.int8), np.empty((rows // block, columns), np.float32)
    for start in range(0, columns, _COLUMNS):  # the head of a large vocabulary would need gigabytes at once
        part = slice(start, start + _COLUMNS)
        blocks = matrix[:, part].reshape(rows // block, block, -1)
        largest = np.maximum(blocks.max(axis=1) / high, blocks.min(axis=1) / -(high + 1))
        scales[:, part] = scale = np.where(largest > 0, np.maximum(largest, _SMALLEST), 1.0)
        values[:, part] = np.clip(np.rint(blocks / scale[:, None]), -(high + 1), high).reshape(rows, -1)
    return values, scales


def quantize_weights(graph: ir.Graph, recipe: WeightsRecipe, gated: Collection[int], roundings: Roundings) -> None:
    """Quantise every projection, update (bypass, pruned unit) and the head, each at the precision that the recipe gives
    its part. At int4 a matrix that no block size divides stays as it is. So does the policy: it is small and sensitive.
    Raises BundleError for a rounding of another matrix, and for fp8 without a measured input.
    """
    for node in list(graph):
        name, weight = str(node.name), node.inputs[1] if len(node.inputs) > 1 else None
        matrix = constant_value(weight)
        update = "/update_" in name  # of a pruned unit
        quantised = update or name.endswith(("_proj", "/product", "head/logits"))
        if node.op_type != "MatMul" or not quantised or matrix is None:
            continue
        precision = weight_precision(name, recipe, gated)
        block = block_of(matrix.shape[0], recipe.block_size) if precision == "int4" else matrix.shape[0]
        if precision not in QUANTISED or block is None or weight is None:
            continue
        c = Chain(graph, node, name)
        if precision == "fp8":
            largest = roundings(name)
            if largest is None and (update or name.startswith("bypass")):
                largest = matrix.shape[0] ** 0.5  # what an RMSNorm of unit gain gives is not larger
            if not isinstance(largest, float):
                raise BundleError(f"What {name} is fed was not measured. Build the target again.")
            # TensorRT fuses both with the MatMul.
            step, eight = c.constant(f"{name}/input_scale", _scale(largest)), int(ir.DataType.FLOAT8E4M3FN)
            fed = c.op("QuantizeLinear", [node.inputs[0], step], "input_fp8", output_dtype=eight)
            node.replace_input_with(0, c.op("DequantizeLinear", [fed, step], "input"))
            scales = _scale(np.abs(matrix).max(axis=0))
            stored, attributes = (matrix / scales).astype(ml_dtypes.float8_e4m3fn), {"axis": 1}
        elif precision == "int8":
            values, scales = quantize_symmetric(matrix, 8, block)
            stored, scales, attributes = values, scales[0], {"axis": 1}
        else:
            if isinstance(rounded := roundings(name), Rounded):
                rounded.check(name, matrix.shape, block)
                values, scales = rounded.codes.astype(np.int8) - MIDDLE, np.maximum(rounded.scales, _SMALLEST)
            else:
                values, scales = quantize_symmetric(matrix, 4, block)
            stored, attributes = values.astype(ml_dtypes.int4), {"axis": 0, "block_size": block}
        own = f"{weight.name}.{precision}"
        constants = [c.constant(own, stored), c.constant(f"{own}.scales", scales)]
        node.replace_input_with(1, c.op("DequantizeLinear", constants, "weight", **attributes))


def _scale(largest: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Return the power of two that scales `largest` to 128 to 256 (E4M3 holds 448), at least float16's smallest."""
    exponent = np.ceil(np.log2(np.maximum(np.asarray(largest, np.float32), 1e-30)))
    return np.asarray(np.maximum(np.exp2(exponent - 8), _SMALLEST), np.float32)
