"""Portable graphs -> what TensorRT compiles. Shapes, types and weights change; the operators only in `trt10`.

Batch is one, a cache has a fixed capacity, the head gives logits of the rows it is asked for (`logit_rows`
[rows] int64): a slice from `first_logit` would make a shape depend on data on the device.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from dash_export.graphs.compose import add_constant, constant_value, drop_unused, transpose_tables
from dash_export.graphs.rounded import Roundings, to_nearest
from dash_export.graphs.trt.decompose import decompose
from dash_export.graphs.trt.quantize import quantize_weights
from dash_export.graphs.trt.types import FLOAT32, set_activation_type
from dash_export.models.spec import Float32Array
from dash_export.targets import EngineRecipe, Recipe

DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
LOGIT_ROWS = "logit_rows"


def lower(model: ir.Model, recipe: Recipe, gated: Collection[int], roundings: Roundings = to_nearest) -> ir.Model:
    """A portable segment, skip graph or specialised policy -> the recipe's GPU dialect, in place.

    `hidden`, caches and weights get the recipe's activation type; `actions`, `logits` and `damage` stay float32.
    """
    engine = recipe.engine
    assert engine is not None
    graph = model.graph
    _fix_shapes(graph, engine)
    _cut_rope(graph, engine.kv_capacity)
    _choose_logit_rows(graph)
    transpose_tables(graph)
    _sum_policy(graph, turing="7.5" in engine.capabilities)
    if recipe.dialect == "trt10":
        decompose(model)
    quantize_weights(graph, recipe.weights, gated, roundings)
    set_activation_type(graph, DTYPES[engine.activations])
    drop_unused(graph)
    return model


def _fix_shapes(graph: ir.Graph, engine: EngineRecipe) -> None:
    sizes = {"batch": 1, "capacity": engine.kv_capacity}
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([_fixed(size, sizes) for size in value.shape])


def _fixed(size: int | ir.SymbolicDim, sizes: dict[str, int]) -> int | ir.SymbolicDim:
    return sizes.get(str(size.value), size) if isinstance(size, ir.SymbolicDim) else size


def _cut_rope(graph: ir.Graph, capacity: int) -> None:
    """Every engine holds its own copy of the tables: only the rows that the cache has."""
    for name in ("rope.cos", "rope.sin"):
        value = graph.initializers.get(name)
        table = constant_value(value)
        if value is not None and table is not None:
            value.replace_all_uses_with(add_constant(graph, f"{name}.{capacity}", table[:capacity]))


def _choose_logit_rows(graph: ir.Graph) -> None:
    first = next((value for value in graph.inputs if value.name == "first_logit"), None)
    node = next((node for node in graph if node.name == "head/wanted"), None)
    if first is None or node is None:
        return
    rows = ir.Value(name=LOGIT_ROWS, shape=ir.Shape(["rows"]), type=ir.TensorType(ir.DataType.INT64))
    gather = ir.node("Gather", [node.inputs[0], rows], {"axis": 1}, name=node.name)
    graph.insert_before(node, gather)
    gather.outputs[0].name, node.outputs[0].name = node.outputs[0].name, f"{node.name}~replaced"
    node.outputs[0].replace_all_uses_with(gather.outputs[0])
    graph.remove(node, safe=True)
    graph.inputs[graph.inputs.index(first)] = rows
    logits = next(value for value in graph.outputs if value.name == "logits")
    if logits.shape is not None:
        logits.shape = ir.Shape([logits.shape[0], "rows", logits.shape[2]])


def _sum_policy(graph: ir.Graph, turing: bool) -> None:
    """The policy's product with one column in float32: as Mul and ReduceSum, for Turing has no such MatMul. That of a
    linear one with several is a MatMul elsewhere: its terms would take memory for every layer and token of a prompt.
    """
    linear = not any(node.name == "policy/relu" for node in graph)
    for node in list(graph):
        columns = constant_value(node.inputs[1]) if node.op_type == "MatMul" else None
        if not str(node.name).startswith("policy/") or columns is None:
            continue
        if columns.shape[-1] == 1 or (linear and turing):
            _sum_of_products(graph, node, columns)
        elif linear:
            node.meta[FLOAT32] = True


def _sum_of_products(graph: ir.Graph, node: ir.Node, columns: Float32Array) -> None:
    """[batch, sequence, hidden] @ [hidden, columns]."""
    axis = add_constant(graph, f"{node.name}/axis", np.array([-1]))
    source, new = node.inputs[0], []
    several = columns.shape[1] > 1
    if several:
        before_last = add_constant(graph, f"{node.name}/before_last", np.array([-2]))
        new.append(ir.node("Unsqueeze", [source, before_last], name=f"{node.name}/once_per_column"))
        source = new[-1].outputs[0]
    weights = add_constant(graph, f"{node.name}/rows", columns.T if several else columns[:, 0])
    new.append(ir.node("Mul", [source, weights], name=f"{node.name}/terms"))
    total = ir.node("ReduceSum", [new[-1].outputs[0], axis], {"keepdims": int(not several)}, name=node.name)
    for made in new:
        made.outputs[0].name = str(made.name)
    graph.insert_before(node, [*new, total])
    total.outputs[0].name, node.outputs[0].name = node.outputs[0].name, f"{node.name}~replaced"
    node.outputs[0].replace_all_uses_with(total.outputs[0])
    graph.remove(node, safe=True)
