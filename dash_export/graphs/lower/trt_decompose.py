"""The `trt10` dialect: operators of TensorRT 10.3 (JetPack 6.2), opset 21; norm, RoPE and attention are decomposed.

A cache is only read: the graph outputs the new rows of K and V (`new.N.key`, `new.N.value`), and the runtime writes
them. Attention takes one softmax over the concatenated scores [q . K_cache, q . k_new]; the cache itself is never
copied. There is no mask input: a query may read the cached rows before `write_indices`, and those new rows whose
`position_ids` are not after its own.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from dash_export.bundle.layout import new_names
from dash_export.graphs.lower.surgery import constant_value, drop_unused_inputs
from dash_export.graphs.portable.portable import WINDOW
from dash_export.graphs.portable.writer import constant

OPSET = 21
IR_VERSION = 10
FLOAT32 = "float32"
"""Key of a node's `meta` that keeps it at float32."""
MASKED = -1e30
"""A score that softmax turns into zero; finite, so that a row without any readable score does not become NaN."""


def decompose(model: ir.Model, capacity: int) -> None:
    """Replace operators of opset 23 and 24 by those of opset 21, in place. Shapes are fixed, and queries scaled."""
    graph = model.graph
    for node in list(graph):
        if node.op_type == "RMSNormalization":
            _norm(graph, node)
        elif node.op_type == "RotaryEmbedding":
            rotary(graph, node)
    if attentions := [node for node in graph if node.op_type == "Attention"]:
        step = _Step(graph, attentions[0], capacity)
        for node in attentions:
            _attention(graph, node, step)
    for node in [node for node in graph if node.op_type == "TensorScatter"]:
        _new_rows(graph, node)
    RemoveUnusedNodesPass()(model)
    drop_unused_inputs(graph)
    graph.opset_imports[""], model.ir_version = OPSET, IR_VERSION


class Chain:
    """Writer of nodes that come before a node `old`, or replace it (`finish`)."""

    def __init__(self, graph: ir.Graph, old: ir.Node, name: str, float32: bool = False) -> None:
        self.graph, self.old, self.name, self.float32 = graph, old, name, float32

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes or None, name=f"{self.name}/{name}")
        node.outputs[0].name = str(node.name)
        if self.float32:
            node.meta[FLOAT32] = True
        self.graph.insert_before(self.old, node)
        return node.outputs[0]

    def constant(self, name: str, array: npt.NDArray[Any] | list[Any]) -> ir.Value:
        return constant(self.graph, name, np.asarray(array))

    def finish(self, result: ir.Value) -> None:
        before = self.old.outputs[0]
        result.name, before.name = before.name, f"{before.name}~replaced"
        result.shape = before.shape
        before.replace_all_uses_with(result, replace_graph_outputs=True)
        self.graph.remove(self.old, safe=True)


def _norm(graph: ir.Graph, node: ir.Node) -> None:
    """Decompose a norm: x / sqrt(mean(x^2) + eps) * gain, over the last axis."""
    c = Chain(graph, node, str(node.name), float32=True)
    value, gain = node.inputs[0], node.inputs[1]
    square, axis = c.op("Mul", [value, value], "square"), c.constant("norm.axis", [-1])
    mean = c.op("ReduceMean", [square, axis], "mean", keepdims=1)
    epsilon = np.array([node.attributes["epsilon"].as_float()], np.float32)
    shifted = c.op("Add", [mean, c.constant(f"norm.epsilon.{epsilon[0]:g}", epsilon)], "shifted")
    scaled = c.op("Div", [value, c.op("Sqrt", [shifted], "root")], "scaled")
    c.finish(c.op("Mul", [scaled, gain], "gained"))


def rotary(graph: ir.Graph, node: ir.Node) -> None:
    """Decompose RoPE of [batch, heads, tokens, head_dim]: [a cos - b sin, b cos + a sin] for the halves a, b of every
    head.
    """
    c = Chain(graph, node, str(node.name))
    value, cos, sin, positions = node.inputs
    rest = None
    if size := node.attributes.get_int("rotary_embedding_dim", 0):
        zero, edge, end = (c.constant(f"rotary.at.{at}", [at]) for at in (0, size, np.iinfo(np.int64).max))
        last = c.constant("rotary.last_axis", [-1])
        rest = c.op("Slice", [value, edge, end, last], "rest")
        value = c.op("Slice", [value, zero, edge, last], "turned_part")
    axis = c.constant("rotary.head_axis", [1])
    cos, sin = (
        c.op("Unsqueeze", [c.op("Gather", [table, positions], f"{name}/rows", axis=0), axis], name)
        for name, table in (("cos", cos), ("sin", sin))
    )
    split = ir.node("Split", [value], {"axis": -1, "num_outputs": 2}, num_outputs=2, name=f"{node.name}/halves")
    a, b = split.outputs
    a.name, b.name = f"{node.name}/halves/a", f"{node.name}/halves/b"
    graph.insert_before(node, split)
    first = c.op("Sub", [c.op("Mul", [a, cos], "a_cos"), c.op("Mul", [b, sin], "b_sin")], "first")
    second = c.op("Add", [c.op("Mul", [b, cos], "b_cos"), c.op("Mul", [a, sin], "a_sin")], "second")
    c.finish(c.op("Concat", [first, second, *([] if rest is None else [rest])], "turned", axis=-1))


class _Step:
    """Values that all layers of a graph share: the sizes; `masks`, by window: which cached and which new rows a query
    may read; `square`: the shape [batch, heads, -1, number of new rows] for query heads and for K/V heads.
    """

    def __init__(self, graph: ir.Graph, first: ir.Node, capacity: int) -> None:
        self.capacity = capacity
        inputs = {str(value.name): value for value in graph.inputs}
        (*_, self.heads, self.head_dim), (*_, self.kv_heads, _) = (
            constant_value(graph.initializers[f"shape.{which}_heads"]).tolist()  # type: ignore[union-attr]
            for which in "qk"
        )
        c = Chain(graph, first, "attention_step")
        rows, positions = c.constant("attention.rows", np.arange(capacity)), inputs["position_ids"]
        # [capacity] against [batch, 1, 1, 1]: every query of a sequence reads the same cached rows.
        start = c.op("Unsqueeze", [inputs["write_indices"], c.constant("attention.start", [1, 2, 3])], "start")
        past = c.op("Less", [rows, start], "past")
        across = c.op("Unsqueeze", [positions, c.constant("attention.across", [1, 2])], "across")
        down = c.op("Unsqueeze", [positions, c.constant("attention.down", [1, 3])], "down")
        new = c.op("GreaterOrEqual", [down, across], "new")
        self.masks = {0: (past, new)}
        for window in sorted({_window(node) for node in graph if node.op_type == "Attention"} - {0}):
            before = c.op("Sub", [down, c.constant(f"attention.window.{window}", [window])], f"before_{window}")
            near = c.op("Greater", [rows, before], f"near_{window}")
            close = c.op("Greater", [across, before], f"close_{window}")
            both = c.op("And", [past, near], f"past_{window}"), c.op("And", [new, close], f"new_{window}")
            self.masks[window] = both
        count = c.op("Shape", [positions], "count", start=1, end=2)
        self.square: dict[int, ir.Value] = {}
        for heads in {self.heads, self.kv_heads}:
            front = c.constant(f"shape.front.{heads}", [0, heads, -1])  # 0: batch, as it is
            self.square[heads] = c.op("Concat", [front, count], f"square_{heads}", axis=0)


def _attention(graph: ir.Graph, node: ir.Node, step: _Step) -> None:
    """Decompose attention of queries over a cache [batch, kv_heads, capacity, head_dim] and new rows."""
    (past_key, key), (past_value, value) = (_written(node, index) for index in (1, 2))
    heads, kv_heads, capacity, head_dim = step.heads, step.kv_heads, step.capacity, step.head_dim
    c = Chain(graph, node, str(node.name))
    wide = Chain(graph, node, f"{node.name}/softmax", float32=True)
    # The queries of one K/V head lie side by side, so that its keys are read once, without a copy per query head.
    grouped = c.constant(f"shape.grouped.{kv_heads}", [0, kv_heads, -1, head_dim])
    query = c.op("Reshape", [node.inputs[0], grouped], "grouped")
    most = node.attributes.get_float("softcap", 0.0)
    cap = c.constant(f"attention.cap.{most:g}", np.array([most], np.float32)) if most else None
    over_past = {each: c.constant(f"shape.past.{each}", [0, each, -1, capacity]) for each in (heads, kv_heads)}

    def scores(keys: ir.Value | None, columns: ir.Value, readable: ir.Value, name: str) -> ir.Value:
        turned = c.op("Transpose", [keys], f"{name}/keys", perm=[0, 1, 3, 2])
        found = c.op("Reshape", [c.op("MatMul", [query, turned], f"{name}/grouped"), columns], name)
        if cap is not None:
            found = c.op("Tanh", [c.op("Div", [found, cap], f"{name}/over_cap")], f"{name}/tanh")
            found = c.op("Mul", [found, cap], f"{name}/capped")
        masked = wide.constant("attention.masked", np.array([MASKED], np.float32))
        return wide.op("Where", [readable, found, masked], f"{name}_masked")

    cached, among_new = step.masks[_window(node)]
    past, new = scores(past_key, over_past[heads], cached, "past"), scores(key, step.square[heads], among_new, "new")
    shares = wide.op("Softmax", [wide.op("Concat", [past, new], "scores", axis=-1)], "shares", axis=-1)
    axis, zero = c.constant("attention.last_axis", [-1]), c.constant("attention.zero", [0])
    edge, end = c.constant("attention.capacity", [capacity]), c.constant("attention.end", [np.iinfo(np.int64).max])

    def mixed(start: ir.Value, stop: ir.Value, columns: ir.Value, rows: ir.Value | None, name: str) -> ir.Value:
        part = c.op("Slice", [shares, start, stop, axis], f"{name}/shares")
        return c.op("MatMul", [c.op("Reshape", [part, columns], f"{name}/grouped_shares"), rows], f"{name}/mixed")

    old = mixed(zero, edge, over_past[kv_heads], past_value, "past")
    fresh = mixed(edge, end, step.square[kv_heads], value, "new")
    spread = c.constant(f"shape.heads.{heads}", [0, heads, -1, head_dim])
    c.finish(c.op("Reshape", [c.op("Add", [old, fresh], "sum"), spread], "spread"))


def _window(attention: ir.Node) -> int:
    return int(attention.metadata_props.get(WINDOW, 0))


def _written(attention: ir.Node, index: int) -> tuple[ir.Value | None, ir.Value | None]:
    """Return (cache, new rows), the inputs of the TensorScatter that feeds an input of Attention."""
    scatter = attention.inputs[index].producer()  # type: ignore[union-attr]
    cache, rows, _ = scatter.inputs  # type: ignore[union-attr]
    return cache, rows


def _new_rows(graph: ir.Graph, scatter: ir.Node) -> None:
    """Replace a cache output by an output of the rows that the TensorScatter would write."""
    present, (cache, rows, _) = scatter.outputs[0], scatter.inputs
    _, layer, which = str(present.name).split(".")
    node = ir.node("Identity", [rows], name=f"{scatter.name}/rows")
    graph.insert_before(scatter, node)
    output = node.outputs[0]
    output.name = new_names(int(layer))[("key", "value").index(which)]
    batch, heads, _, head_dim = cache.shape  # type: ignore[union-attr,misc]
    output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([batch, heads, "sequence", head_dim])
    present.replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove(scatter, safe=True)
