"""Products with a model's matrices in the `ort` dialect: float, rounded as the recipe says, or codes kept (grid.py)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

from dash_export.bundle.recipe import BITS, QUANTISED, Recipe
from dash_export.bundle.records import Manifest
from dash_export.graphs.lower.grid import BLOCK, Grid, grid_from, grid_of, packed
from dash_export.graphs.lower.rounded import Rounded, Roundings, weight_precision
from dash_export.graphs.portable.stored import STORED, StoredWriter
from dash_export.models.spec import Float32Array

CONTRIB = "com.microsoft"
ACCURACY_LEVEL = 4
"""Activations are quantised to int8 per block: the fast kernels on AVX2, AVX-512-VNNI and NEON."""

Codes = npt.NDArray[Any]
Blocks = tuple[Codes, Float32Array, Codes | None]
"""Packed codes [out, blocks, block * bits / 8] uint8, float32 scales [out, blocks], zero points (packed) or None."""


def quantize_block(matrix: Float32Array, bits: int, block: int, symmetric: bool) -> Blocks:
    """Quantise [in, out] float32 in blocks by ONNX Runtime's own quantiser, each weight rounded to nearest."""
    config = DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=symmetric, bits=bits)
    codes, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(matrix))
    out = matrix.shape[1]
    return codes, scales.reshape(out, -1), None if symmetric else zeros.reshape(out, -1)


def eight_bit_block(rows: int, node: str) -> int:
    """Return the block size of 8-bit codes for a node's matrix of so many rows. These codes are symmetric: blocks of 32
    with zero points lose hardly less, and a token takes up to a fifth longer. Activations are rounded in the same
    blocks, and those that enter `down_proj` are the least even ones: it gains nothing from blocks of 128.
    """
    widest = 64 if node.endswith("down_proj") else 128
    return next((block for block in (128, 64, 32) if block <= widest and rows % block == 0), 16)


class ProductWriter(StoredWriter):
    """Writer of a graph that takes its weights by name from portable graphs."""

    def __init__(
        self,
        name: str,
        doc: str,
        parts: Mapping[str, ir.Model],
        manifest: Manifest,
        recipe: Recipe,
        roundings: Roundings,
    ) -> None:
        super().__init__(name, doc)
        self.graph.opset_imports[CONTRIB] = 1
        self.facts, self.gated = manifest.decoder, manifest.policy.layers
        self.traits, self.recipe, self.roundings = manifest.decoder.traits, recipe.weights, roundings
        self.weights = {
            weight: value.const_value
            for part in parts.values()
            for weight, value in part.graph.initializers.items()
            if value.const_value is not None
        }

    def array(self, weight: str) -> Float32Array:
        array: Float32Array = self.weights[weight].numpy()
        return array

    def shape(self, weight: str) -> tuple[int, ...]:
        """Return a weight's shape, without reading it; a matrix is [in, out]."""
        return tuple(map(int, self.weights[weight].shape.numpy()))

    def stored(self, weight: str) -> ir.Value:
        """Return a constant of a portable graph, unchanged."""
        return self.initializer(weight, self.weights[weight])

    def contrib(self, op_type: str, inputs: Sequence[ir.Value | None], name: str, **options: Any) -> ir.Value:
        return self.node(op_type, inputs, name, 1, CONTRIB, **options)[0]

    def parts(self, value: ir.Value, sizes: Sequence[int]) -> list[ir.Value]:
        return self.split(value, sizes, f"{value.name}/sizes", f"{value.name}/split")

    def linear(self, source: ir.Value, node: str, weights: Sequence[str], times: float = 1.0) -> ir.Value:
        """Return source @ weights + biases. The matrices [in, out] lie side by side, quantised where the recipe says
        so. The first matrix and its bias are multiplied by `times`.
        """
        rows, widths = self.shape(weights[0])[0], [self.shape(weight)[1] for weight in weights]
        factors = [np.float32(times), *[np.float32(1)] * (len(weights) - 1)]
        given = [self.weights.get(weight.removesuffix("weight") + "bias") for weight in weights]
        bias = None
        if any(each is not None for each in given):
            biases = [
                np.zeros(width, np.float32) if each is None else each.numpy() * factor
                for each, width, factor in zip(given, widths, factors, strict=True)
            ]
            bias = self.initializer(f"{node}.bias", np.concatenate(biases))
        precision, block = weight_precision(node, self.recipe, self.gated), self.recipe.block_size
        as_is = precision == "int4" and self.recipe.rounding == "as-is"
        small = min(rows, sum(widths)) < block
        if as_is or (precision == "int4" and not small):
            grids = [self.grid(node, place, weight) for place, weight in enumerate(weights)]
            if None not in grids:
                return self.on_grid(source, node, rows, [grids[0].times(times), *grids[1:]], bias)
        if as_is:
            precision = "int8"
        matrices = [self.array(weight) for weight in weights]
        if times != 1:
            matrices[0] = matrices[0] * factors[0]
        wide = matrices[0] if len(matrices) == 1 else np.concatenate(matrices, axis=1)
        if precision not in QUANTISED or small:  # smaller than a block: stays float32
            value = self.op("MatMul", [source, self.initializer(f"{node}.weight", wide)], node)
            return value if bias is None else self.op("Add", [value, bias], f"{node}/bias")
        return self.nbits(source, node, rows, BITS[precision], *self.quantized(node, wide, BITS[precision]), bias)

    def quantized(self, node: str, matrix: Float32Array, bits: int) -> tuple[int, Blocks]:
        """Return the block size and the blocks of a node's matrix [in, out], each weight rounded to nearest."""
        block = eight_bit_block(len(matrix), node) if bits == 8 else self.recipe.block_size
        return block, quantize_block(matrix, bits, block, self.recipe.symmetric or bits == 8)

    def grid(self, node: str, place: int, weight: str) -> Any:
        """Return the Grid of a matrix of the node `part/name+name`: the file's codes, or those that were calibrated.
        None where the file has none of 4 bits or its rests would be coarse, and where nothing was calibrated.
        """
        if self.recipe.rounding == "as-is":
            stored = getattr(self.weights[weight], "meta", {}).get(STORED)
            return None if stored is None else grid_of(stored)
        part, _, names = node.rpartition("/")
        rounded = self.roundings(f"{part}/{names.split('+')[place]}")
        if not isinstance(rounded, Rounded):
            return None
        rounded.check(node, self.shape(weight), self.recipe.block_size)
        return grid_from(rounded)

    def on_grid(self, source: ir.Value, node: str, rows: int, grids: Sequence[Grid], bias: ir.Value | None) -> ir.Value:
        """Return the product of `source` with matrices of `rows` inputs whose 4-bit codes stay what they are."""
        codes, scales, zeros, more = packed(grids)
        if more:
            means = self.op("AveragePool", [source], f"{node}/means", kernel_shape=[BLOCK], strides=[BLOCK])
            source = self.op("Concat", [source, means], f"{node}/with_means", axis=-1)
        found = codes, scales, None if self.recipe.symmetric else zeros
        return self.nbits(source, node, rows + more, 4, grids[0].codes.shape[-1], found, bias)

    def nbits(
        self, source: ir.Value, node: str, rows: int, bits: int, block: int, found: Blocks, bias: ir.Value | None
    ) -> ir.Value:
        """Return source @ matrix [rows, out] + bias; `found`: the matrix's packed codes, scales and zero points."""
        inputs: list[ir.Value | None] = [source, *self.blocks(f"{node}.weight", bits, *found)]
        if bias is not None:
            inputs += [*[None] * (5 - len(inputs)), bias]
        options = {"K": rows, "N": len(found[0]), "bits": bits, "block_size": block, "accuracy_level": ACCURACY_LEVEL}
        return self.contrib("MatMulNBits", inputs, node, **options)

    def blocks(self, weight: str, bits: int, codes: Codes, scales: Float32Array, zeros: Codes | None) -> list[ir.Value]:
        """Return constants of the codes, the scales and, if there are any, the zero points."""
        found = [self.initializer(f"{weight}.q{bits}", codes), self.initializer(f"{weight}.scales", scales)]
        return found if zeros is None else [*found, self.initializer(f"{weight}.zero_points", zeros)]
