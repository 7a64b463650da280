"""Products with a model's matrices in the `ort` dialect: float, rounded as the recipe says, or with a GGUF's codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dash_export.graphs.grid import BLOCK, Grid, grid_of, packed
from dash_export.graphs.ort_quantize import ACCURACY_LEVEL, CONTRIB, quantized
from dash_export.graphs.rounded import Roundings, weight_precision
from dash_export.graphs.stored import STORED
from dash_export.graphs.writer import GraphWriter
from dash_export.manifest import Manifest
from dash_export.targets import BITS, QUANTISED, Recipe

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[Any]


class ProductWriter(GraphWriter):
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
        self.facts, self.gated = manifest.model, manifest.policy.layers
        self.traits, self.recipe, self.roundings = manifest.model.traits, recipe.weights, roundings
        self.weights = {
            weight: value.const_value
            for part in parts.values()
            for weight, value in part.graph.initializers.items()
            if value.const_value is not None
        }

    def array(self, weight: str) -> Floats:
        array: Floats = self.weights[weight].numpy()
        return array

    def columns(self, weight: str) -> int:
        """Return how many columns a matrix [in, out] has, without reading it."""
        return int(self.weights[weight].shape.numpy()[1])

    def stored(self, weight: str) -> ir.Value:
        """Return a constant of a portable graph, unchanged."""
        return self.initializer(weight, self.weights[weight])

    def constant(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        return self.initializer(name, np.ascontiguousarray(array))

    def contrib(self, op_type: str, inputs: Sequence[ir.Value | None], name: str, **options: Any) -> ir.Value:
        return self.node(op_type, inputs, name, 1, CONTRIB, **options)[0]

    def parts(self, value: ir.Value, sizes: Sequence[int]) -> list[ir.Value]:
        return self.split(
            value, self.constant(f"{value.name}/sizes", np.array(sizes)), f"{value.name}/split", len(sizes)
        )

    def linear(self, source: ir.Value, node: str, weights: Sequence[str], times: float = 1.0) -> ir.Value:
        """Return source @ weights + biases. The matrices [in, out] lie side by side, quantised where the recipe says
        so. The first matrix and its bias are multiplied by `times`.
        """
        widths = [self.columns(weight) for weight in weights]
        factors = [np.float32(times), *[np.float32(1)] * (len(weights) - 1)]
        given = [self.weights.get(weight.removesuffix("weight") + "bias") for weight in weights]
        bias = None
        if any(each is not None for each in given):
            biases = [
                np.zeros(width, np.float32) if each is None else each.numpy() * factor
                for each, width, factor in zip(given, widths, factors, strict=True)
            ]
            bias = self.constant(f"{node}.bias", np.concatenate(biases))
        precision, block = weight_precision(node, self.recipe, self.gated), self.recipe.block_size
        if precision == "int4" and self.recipe.rounding == "as-is":
            grids = [self.grid(weight, factor) for weight, factor in zip(weights, factors, strict=True)]
            if None not in grids:
                return self.on_grid(source, node, grids, bias)
            precision = "int8"
        matrices = [self.array(weight) for weight in weights]
        if times != 1:
            matrices[0] = matrices[0] * factors[0]
        rows, columns = len(matrices[0]), sum(widths)
        if precision not in QUANTISED or min(rows, columns) < block:  # smaller than a block: stays float32
            wide = matrices[0] if len(matrices) == 1 else np.concatenate(matrices, axis=1)
            value = self.op("MatMul", [source, self.constant(f"{node}.weight", wide)], node)
            return value if bias is None else self.op("Add", [value, bias], f"{node}/bias")
        bits = BITS[precision]
        found = quantized(node, matrices, bits, self.recipe, self.roundings, times)
        packed, *grid = self.blocks(f"{node}.weight", bits, *found)
        inputs = [source, packed, *grid] if bias is None else [source, packed, *grid, *[None] * (3 - len(grid)), bias]
        options = {"K": rows, "N": columns, "bits": bits, "block_size": block, "accuracy_level": ACCURACY_LEVEL}
        return self.contrib("MatMulNBits", inputs, node, **options)

    def grid(self, weight: str, factor: float) -> Any:
        """Return the Grid of a matrix times a factor; None without 4-bit codes, or where its rests would be coarse."""
        stored = getattr(self.weights[weight], "meta", {}).get(STORED)
        found = None if stored is None else grid_of(stored)
        return None if found is None else found.times(factor)

    def on_grid(self, source: ir.Value, node: str, grids: Sequence[Grid], bias: ir.Value | None) -> ir.Value:
        """Return the product of `source` with matrices whose 4-bit codes stay those of the file."""
        rows, columns = BLOCK * grids[0].codes.shape[1], sum(len(grid.codes) for grid in grids)
        codes, scales, zeros, more = packed(grids)
        if more:
            means = self.op("AveragePool", [source], f"{node}/means", kernel_shape=[BLOCK], strides=[BLOCK])
            source = self.op("Concat", [source, means], f"{node}/with_means", axis=-1)
        parts: dict[str, npt.NDArray[Any]] = {"q4": codes, "scales": scales, "zero_points": zeros}
        grid = [self.constant(f"{node}.weight.{name}", each) for name, each in parts.items()]
        options = {"K": rows + more, "N": columns, "bits": 4, "block_size": BLOCK, "accuracy_level": ACCURACY_LEVEL}
        inputs = [source, *grid] if bias is None else [source, *grid, None, bias]
        return self.contrib("MatMulNBits", inputs, node, **options)

    def blocks(self, weight: str, bits: int, codes: Codes, scales: Floats, zeros: Codes) -> list[ir.Value]:
        """Return constants of the codes, the scales and, unless the recipe is symmetric, the zero points."""
        found = [self.constant(f"{weight}.q{bits}", codes), self.constant(f"{weight}.scales", scales)]
        return found if self.recipe.symmetric else [*found, self.constant(f"{weight}.zero_points", zeros)]
