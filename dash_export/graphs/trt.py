"""Portable graphs -> what TensorRT compiles. Shapes, types and weights change; the operators only in `trt10`.

Batch is one, a cache has a fixed capacity, the head gives the logits of the last token: a slice from `first_logit`
would make a shape depend on data on the device. Every float has 16 bits but in norms, logits and damage: the networks
TensorRT builds are strongly typed, so what the graph says is what runs, and every conversion is a Cast here.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from dash_export.graphs.rounded import Roundings, to_nearest
from dash_export.graphs.surgery import add_constant, constant_value, drop_unused, drop_unused_inputs, transpose_tables
from dash_export.graphs.trt_decompose import FLOAT32, Chain, decompose
from dash_export.graphs.trt_quantize import quantize_weights
from dash_export.targets import EngineRecipe, Recipe

FLOAT32_OUTPUTS = ("logits", "damage")
_NAMES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def lower(model: ir.Model, recipe: Recipe, gated: Collection[int], roundings: Roundings = to_nearest) -> ir.Model:
    """A portable segment, bypass or policy -> the recipe's GPU dialect, in place. `gated`: the layers of all units.

    `hidden`, caches and weights get the recipe's activation type; `logits` and `damage` stay float32.
    """
    engine = recipe.engine
    assert engine is not None
    graph = model.graph
    _fix_shapes(graph, engine)
    _cut_rope(graph, engine.kv_capacity)
    _give_last_logits(graph)
    transpose_tables(graph)
    _sum_policy(graph)
    if recipe.dialect == "trt10":
        decompose(model)
    else:
        _make_mask(graph, engine.kv_capacity)
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


def _make_mask(graph: ir.Graph, capacity: int) -> None:
    """Which cached rows a query may read, of its position: no input, which two Attentions of one TensorRT-RTX engine
    cannot share.
    """
    inputs = {value.name: value for value in graph.inputs}
    if "attention_mask" not in inputs:
        return
    axes, rows = (
        add_constant(graph, "mask.axes", np.array([1, 3])),
        add_constant(graph, "mask.rows", np.arange(capacity)),
    )
    down = ir.node("Unsqueeze", [inputs["position_ids"], axes], name="mask/queries")
    mask = ir.node("GreaterOrEqual", [down.outputs[0], rows], name="mask/readable")
    for node in (down, mask):
        node.outputs[0].name = str(node.name)
    graph.insert_before(graph[0], [down, mask])
    inputs["attention_mask"].replace_all_uses_with(mask.outputs[0])
    drop_unused_inputs(graph)


def _give_last_logits(graph: ir.Graph) -> None:
    first = next((value for value in graph.inputs if value.name == "first_logit"), None)
    if first is None:
        return
    first.replace_all_uses_with(add_constant(graph, "head.last", np.array([-1])))
    graph.inputs.remove(first)
    logits = next(value for value in graph.outputs if value.name == "logits")
    if logits.shape is not None:
        logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])


def _sum_policy(graph: ir.Graph) -> None:
    """The policy's product, [1, sequence, hidden] @ [hidden, units], in float32 as Mul and ReduceSum: TensorRT rounds
    the factors of a MatMul to TF32, and has none for Turing.
    """
    node = next((node for node in graph if node.name == "policy/score"), None)
    weights = constant_value(node.inputs[1]) if node is not None else None
    if node is None or weights is None:
        return
    c = Chain(graph, node, "policy")
    spread = c.op("Unsqueeze", [node.inputs[0], c.constant("policy/before_last", np.array([-2]))], "once_per_unit")
    terms = c.op("Mul", [spread, c.constant("policy/rows", weights.T)], "terms")
    c.finish(c.op("ReduceSum", [terms, c.constant("policy/last", np.array([-1]))], "summed", keepdims=0))


def set_activation_type(graph: ir.Graph, dtype: ir.DataType) -> None:
    """float32 -> `dtype` in every node but those `_stays_float32` names; weights follow their node.

    Inputs and outputs follow too, except `logits` and `damage`, which the host reads as float32.
    """
    if dtype == ir.DataType.FLOAT:
        return
    types = _Types(graph)
    for value in graph.inputs:
        if value.dtype == ir.DataType.FLOAT:
            types.set(value, dtype)
    for node in list(graph):
        wanted = ir.DataType.FLOAT if _stays_float32(node) else dtype
        floats = [(index, value) for index, value in enumerate(node.inputs) if types.is_float(value)]
        for index, source in floats:
            assert source is not None
            node.replace_input_with(index, types.converted(source, wanted, node))
        if floats:
            for output in node.outputs:
                types.set(output, wanted)
    for index, value in enumerate(list(graph.outputs)):
        wanted = ir.DataType.FLOAT if value.name in FLOAT32_OUTPUTS else dtype
        if types.is_float(value) and value.dtype != wanted:
            name, value.name = value.name, f"{value.name}/{_NAMES[value.dtype or dtype]}"
            graph.outputs[index] = types.converted(value, wanted, None)
            graph.outputs[index].name = name


class _Types:
    """Which values of a graph are floats, of which type, and what they were converted to."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._floats: set[ir.Value] = set()
        self._converted: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def set(self, value: ir.Value, dtype: ir.DataType) -> None:
        self._floats.add(value)
        value.type = ir.TensorType(dtype)

    def is_float(self, value: ir.Value | None) -> bool:
        return value is not None and (
            value in self._floats or (value.is_initializer() and value.dtype == ir.DataType.FLOAT)
        )

    def converted(self, value: ir.Value, wanted: ir.DataType, before: ir.Node | None) -> ir.Value:
        """`value` at `wanted`, converted once: weights now, the rest by a Cast before a node (None: at the end)."""
        if value.dtype == wanted:
            return value
        if (value, wanted) not in self._converted:
            name = f"{value.name}/{_NAMES[wanted]}"
            if value.is_initializer():
                assert value.const_value is not None
                found = add_constant(self._graph, name, value.const_value.numpy().astype(wanted.numpy()))
            else:
                node = ir.node("Cast", [value], {"to": int(wanted)}, name=name)
                self._graph.append(node) if before is None else self._graph.insert_before(before, node)
                found = node.outputs[0]
                found.name, found.shape = name, value.shape
                self.set(found, wanted)
            self._converted[value, wanted] = found
        return self._converted[value, wanted]


def _stays_float32(node: ir.Node) -> bool:
    """Sums of squares overflow float16 and lose small terms in bfloat16; a damage is compared with a threshold."""
    return FLOAT32 in node.meta or node.op_type == "RMSNormalization" or str(node.name).startswith("policy/")
