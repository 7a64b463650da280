"""Lowering of portable graphs to what TensorRT compiles. Shapes, types and weights change; operators only in `trt10`.

Batch is one, or up to the recipe's `sequences`; a cache has a fixed capacity. The head gives only the last token's
logits: a slice from `first_logit` would make a shape depend on data on the device. Every float has 16 bits except in
norms, logits and damage. TensorRT builds strongly typed networks: the types in the graph are the types that run, so
every conversion is a Cast in the graph.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from dash_export.bundle.layout import FINAL_STATE, POOLED, STATES
from dash_export.bundle.recipe import Recipe
from dash_export.bundle.records import Manifest
from dash_export.core.facts import rope_tables
from dash_export.errors import BackendError
from dash_export.graphs.lower.rounded import Roundings, to_nearest
from dash_export.graphs.lower.surgery import constant_value, drop_unused_inputs
from dash_export.graphs.lower.trt_decompose import FLOAT32, Chain, decompose
from dash_export.graphs.lower.trt_encoder import lower_encoder
from dash_export.graphs.lower.trt_quantize import quantize_weights
from dash_export.graphs.portable.writer import constant

FLOAT32_OUTPUTS = ("logits", "damage", "foreign", POOLED, STATES)
FLOAT32_INPUTS = ("pixel_values", "before_1", "before_2", "before_3")
"""Inputs and outputs that the host writes and reads."""
NO_FLOATS = ("Shape", "Greater")
"""Operators that read floats and give none."""
DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def lower(model: ir.Model, manifest: Manifest, recipe: Recipe, roundings: Roundings = to_nearest) -> ir.Model:
    """Lower a portable segment, bypass or policy of a bundle to the recipe's GPU dialect, in place.

    `hidden`, caches and weights get the recipe's activation type; what the host reads and writes stays float32, and so
    do an encoder's exits and policy. The weights of an encoder are not quantised.
    """
    assert recipe.engine is not None
    graph, capacity = model.graph, recipe.engine.kv_capacity
    if manifest.model.decides == "input":
        lower_encoder(model, manifest.encoder, recipe.dialect)
        set_activation_type(graph, DTYPES[recipe.engine.activations])
        return model
    sizes = {"capacity": capacity} | ({"batch": 1} if recipe.engine.sequences == 1 else {})
    graph.outputs[:] = [value for value in graph.outputs if value.name != FINAL_STATE]  # no output on a device
    _fix_shapes(graph, sizes)
    _fix_rope(graph, rope_tables(manifest.decoder, capacity))
    _give_last_logits(graph)
    _sum_policy(graph)
    _scale_queries(graph)
    if recipe.dialect != "trt10" and any("softcap" in node.attributes for node in graph):
        raise BackendError(
            "TensorRT's Attention caps no scores, and this model's are: copy the recipe and set dialect = \"trt10\"."
        )
    if recipe.dialect == "trt10":
        decompose(model, capacity)
    else:
        _make_mask(graph, capacity)
    quantize_weights(graph, recipe.weights, manifest.policy.layers, roundings)
    set_activation_type(graph, DTYPES[recipe.engine.activations])
    RemoveUnusedNodesPass()(model)
    return model


def _fix_shapes(graph: ir.Graph, sizes: Mapping[str, int]) -> None:
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            named = [size.value if isinstance(size, ir.SymbolicDim) else size for size in value.shape]
            value.shape = ir.Shape([sizes.get(str(size), size) for size in named])


def _fix_rope(graph: ir.Graph, tables: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Make the RoPE tables constants, of as many rows as the cache has."""
    for value in [value for value in graph.inputs if value.name in tables]:
        graph.inputs.remove(value)
        table = tables[str(value.name)]
        value.replace_all_uses_with(constant(graph, f"{value.name}.{len(table)}", table))


def _make_mask(graph: ir.Graph, capacity: int) -> None:
    """Compute the mask from positions: two Attentions of one TensorRT-RTX engine cannot share a mask input."""
    inputs = {value.name: value for value in graph.inputs}
    if "attention_mask" in inputs:
        c = Chain(graph, graph[0], "mask")
        down = c.op("Unsqueeze", [inputs["position_ids"], c.constant("mask.axes", [1, 3])], "queries")
        mask = c.op("GreaterOrEqual", [down, c.constant("mask.rows", np.arange(capacity))], "readable")
        inputs["attention_mask"].replace_all_uses_with(mask)
        drop_unused_inputs(graph)


def _give_last_logits(graph: ir.Graph) -> None:
    for first in [value for value in graph.inputs if value.name == "first_logit"]:
        first.replace_all_uses_with(constant(graph, "head.last", np.array([-1])))
        graph.inputs.remove(first)
        logits = next(value for value in graph.outputs if value.name == "logits")
        if logits.shape is not None:
            logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])


def _sum_policy(graph: ir.Graph) -> None:
    """Replace the policy's MatMul by Mul and ReduceSum: TensorRT rounds factors to TF32, and Turing has none."""
    for node in [node for node in graph if node.name == "policy/score"]:
        weights = constant_value(node.inputs[1])
        assert weights is not None
        c = Chain(graph, node, "policy")
        spread = c.op("Unsqueeze", [node.inputs[0], c.constant("policy/before_last", [-2])], "once_per_unit")
        terms = c.op("Mul", [spread, c.constant("policy/rows", weights.T)], "terms")
        c.finish(c.op("ReduceSum", [terms, c.constant("policy/last", [-1])], "summed", keepdims=0))


def _scale_queries(graph: ir.Graph) -> None:
    """Scale queries before Attention: by its `scale` TensorRT's parser scales keys, too, in a pass over the cache."""
    for node in [node for node in graph if node.op_type == "Attention"]:
        c, scale = Chain(graph, node, str(node.name)), node.attributes["scale"].as_float()
        factor = c.constant(f"attention.scale.{scale:g}", np.array([scale], np.float32))
        node.replace_input_with(0, c.op("Mul", [node.inputs[0], factor], "scaled"))
        node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)


def set_activation_type(graph: ir.Graph, dtype: ir.DataType) -> None:
    """Convert float32 to `dtype` in every node except those that `_stays_float32` names; weights follow their node.

    Inputs and outputs follow too, except those that the host reads and writes, as float32.
    """
    made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def converted(value: ir.Value, wanted: ir.DataType, before: ir.Node | None) -> ir.Value:
        """Return `value` as `wanted`, converted once: a weight now, others by a Cast before `before` (None: at end)."""
        if value.dtype == wanted:
            return value
        if (value, wanted) not in made:
            name = f"{value.name}/{wanted.name.lower()}"
            if (weight := constant_value(value)) is not None:
                made[value, wanted] = constant(graph, name, weight.astype(wanted.numpy()))
            else:
                cast = ir.node("Cast", [value], {"to": int(wanted)}, name=name)
                graph.append(cast) if before is None else graph.insert_before(before, cast)
                (found,) = cast.outputs
                found.name, found.shape, found.type = name, value.shape, ir.TensorType(wanted)
                made[value, wanted] = found
        return made[value, wanted]

    def is_float(value: ir.Value | None) -> bool:
        return value is not None and value.dtype in (ir.DataType.FLOAT, dtype)

    for value in graph.inputs:
        if is_float(value) and value.name not in FLOAT32_INPUTS:
            value.type = ir.TensorType(dtype)
    for node in list(graph):
        wanted = ir.DataType.FLOAT if _stays_float32(node) else dtype
        floats = [(index, value) for index, value in enumerate(node.inputs) if value is not None and is_float(value)]
        for index, source in floats:
            node.replace_input_with(index, converted(source, wanted, node))
        for output in node.outputs:
            if node.op_type == "QuantizeLinear":
                output.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
            elif floats and node.op_type not in NO_FLOATS:
                output.type = ir.TensorType(wanted)
    for index, value in enumerate(list(graph.outputs)):
        wanted = ir.DataType.FLOAT if value.name in FLOAT32_OUTPUTS else dtype
        if is_float(value) and value.dtype != wanted:
            name, value.name = value.name, f"{value.name}/before_cast"
            graph.outputs[index] = converted(value, wanted, None)
            graph.outputs[index].name = name


def _stays_float32(node: ir.Node) -> bool:
    """Return whether a node stays float32: a norm's sums overflow float16, and a damage meets a threshold."""
    norms = ("RMSNormalization", "LayerNormalization")
    return FLOAT32 in node.meta or node.op_type in norms or str(node.name).startswith("policy/")
