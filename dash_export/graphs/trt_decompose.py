"""The `trt10` dialect: what TensorRT 10.3 (JetPack 6.2) has, opset 21. Norm, RoPE and attention in plain operators.

A cache is only read: the graph gives the new rows of K and V (`new.N.key`, `new.N.value`) and the runtime writes them.
Attention takes one softmax over the concatenated scores [q . K_cache, q . k_new]; the cache itself is never copied.
Which rows a query may read follows from `write_indices` (cached rows lie before it) and `position_ids` (of the new
rows, those not after the query), so there is no mask among the inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dash_export.errors import BackendError
from dash_export.graphs.surgery import add_constant, drop_unused_inputs
from dash_export.names import new_names, present_names

OPSET = 21
IR_VERSION = 10
FLOAT32 = "float32"
"""Key of a node's `meta` that keeps it at float32."""
MASKED = -1e30
"""A score that softmax turns into zero; finite, so that a row without any readable score is no NaN."""


def decompose(model: ir.Model) -> None:
    """The portable operators of opset 23 and 24 in operators of opset 21, in place. Shapes are fixed already."""
    graph = model.graph
    for node in list(graph):
        if node.op_type == "RMSNormalization":
            _norm(graph, node)
        elif node.op_type == "RotaryEmbedding":
            _rotary(graph, node)
    for node in [node for node in graph if node.op_type == "Attention"]:
        _attention(graph, node)
    _new_rows(graph)
    graph.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION


class Chain:
    """Nodes that take one node's place."""

    def __init__(self, graph: ir.Graph, old: ir.Node, name: str, float32: bool = False) -> None:
        self.graph, self.old, self.name, self.float32 = graph, old, name, float32

    def op(self, op_type: str, inputs: list[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes or None, name=f"{self.name}/{name}")
        node.outputs[0].name = str(node.name)
        if self.float32:
            node.meta[FLOAT32] = True
        self.graph.insert_before(self.old, node)
        return node.outputs[0]

    def constant(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        return self.graph.initializers.get(name) or add_constant(self.graph, name, array)

    def finish(self, result: ir.Value) -> None:
        before = self.old.outputs[0]
        result.name, before.name = before.name, f"{before.name}~replaced"
        result.shape = before.shape
        before.replace_all_uses_with(result, replace_graph_outputs=True)
        self.graph.remove(self.old, safe=True)


def _norm(graph: ir.Graph, node: ir.Node) -> None:
    """x / sqrt(mean(x^2) + eps) * gain, over the last axis."""
    c = Chain(graph, node, str(node.name), float32=True)
    value, gain = node.inputs[0], node.inputs[1]
    axes = c.constant("norm.axis", np.array([-1]))
    mean = c.op("ReduceMean", [c.op("Mul", [value, value], "square"), axes], "mean", keepdims=1)
    epsilon = node.attributes["epsilon"].as_float()
    shifted = c.op("Add", [mean, c.constant(f"norm.epsilon.{epsilon:g}", np.array([epsilon], np.float32))], "shifted")
    scaled = c.op("Div", [value, c.op("Sqrt", [shifted], "root")], "scaled")
    c.finish(c.op("Mul", [scaled, gain], "gained"))


def _rotary(graph: ir.Graph, node: ir.Node) -> None:
    """[a cos - b sin, b cos + a sin] for the halves a, b of every head."""
    c = Chain(graph, node, str(node.name))
    value, cos, sin, positions = node.inputs
    axis = c.constant("rotary.head_axis", np.array([1]))
    cos, sin = (
        c.op("Unsqueeze", [c.op("Gather", [table, positions], f"{name}/rows", axis=0), axis], name)
        for name, table in (("cos", cos), ("sin", sin))
    )
    split = ir.node("Split", [value], {"axis": -1, "num_outputs": 2}, num_outputs=2, name=f"{node.name}/halves")
    for output, half in zip(split.outputs, "ab", strict=True):
        output.name = f"{node.name}/halves/{half}"
    graph.insert_before(node, split)
    a, b = split.outputs
    first = c.op("Sub", [c.op("Mul", [a, cos], "a_cos"), c.op("Mul", [b, sin], "b_sin")], "first")
    second = c.op("Add", [c.op("Mul", [b, cos], "b_cos"), c.op("Mul", [a, sin], "a_sin")], "second")
    c.finish(c.op("Concat", [first, second], "turned", axis=-1))


def _attention(graph: ir.Graph, node: ir.Node) -> None:
    """[1, heads, sequence, head_dim] queries over a cache [1, kv_heads, capacity, head_dim] and the new rows."""
    query, (past_key, key), (past_value, value) = node.inputs[0], *(_written(node, index) for index in (1, 2))
    assert past_key.shape is not None
    _, kv_heads, capacity, head_dim = past_key.shape.numpy()
    c = Chain(graph, node, str(node.name))
    wide = Chain(graph, node, f"{node.name}/softmax", float32=True)
    # Queries of one K/V head lie side by side, so that its keys are read once, without a copy per query head.
    grouped = c.constant(f"shape.grouped.{kv_heads}", np.array([1, kv_heads, -1, head_dim]))
    scale = c.constant(f"attention.scale.{head_dim}", np.array([node.attributes["scale"].as_float()], np.float32))
    query = c.op("Reshape", [c.op("Mul", [query, scale], "scaled"), grouped], "grouped")

    def scores(keys: ir.Value, columns: ir.Value, readable: ir.Value, name: str) -> ir.Value:
        turned = c.op("Transpose", [keys], f"{name}/keys", perm=[0, 1, 3, 2])
        found = c.op("Reshape", [c.op("MatMul", [query, turned], f"{name}/grouped"), columns], name)
        masked = wide.constant("attention.masked", np.array([MASKED], np.float32))
        return wide.op("Where", [readable, found, masked], f"{name}_masked")

    heads = _heads_of(node)
    step = _Masks(graph, node, capacity)
    past = scores(past_key, c.constant(f"shape.past.{heads}", np.array([1, heads, -1, capacity])), step.past, "past")
    fresh = scores(key, step.square(heads), step.new, "new")
    shares = wide.op("Softmax", [wide.op("Concat", [past, fresh], "scores", axis=-1)], "shares", axis=-1)
    axis = c.constant("attention.last_axis", np.array([-1]))
    zero, edge = c.constant("attention.zero", np.array([0])), c.constant("attention.capacity", np.array([capacity]))
    end = c.constant("attention.end", np.array([np.iinfo(np.int64).max]))

    def mixed(start: ir.Value, stop: ir.Value, columns: ir.Value, rows: ir.Value, name: str) -> ir.Value:
        part = c.op("Slice", [shares, start, stop, axis], f"{name}/shares")
        return c.op("MatMul", [c.op("Reshape", [part, columns], f"{name}/grouped_shares"), rows], f"{name}/mixed")

    old = mixed(
        zero, edge, c.constant(f"shape.past.{kv_heads}", np.array([1, kv_heads, -1, capacity])), past_value, "past"
    )
    new = mixed(edge, end, step.square(kv_heads), value, "new")
    spread = c.constant(f"shape.heads.{heads}", np.array([1, heads, -1, head_dim]))
    c.finish(c.op("Reshape", [c.op("Add", [old, new], "sum"), spread], "spread"))


class _Masks:
    """Which cached and which new rows a query may read, and the shape of a square of new rows; made once a graph."""

    def __init__(self, graph: ir.Graph, node: ir.Node, capacity: int) -> None:
        self._inputs = {str(value.name): value for value in graph.inputs}
        self._c = Chain(graph, node, "attention_step")
        self._made = {str(value.name): value for item in graph for value in item.outputs}
        rows = self._c.constant("attention.rows", np.arange(capacity))
        # [capacity] against [1]: every query reads the same cached rows.
        self.past = self._op("Less", [rows, self._input("write_indices")], "past")
        positions = self._input("position_ids")
        across = self._op("Unsqueeze", [positions, self._c.constant("attention.across", np.array([1, 2]))], "across")
        down = self._op("Unsqueeze", [positions, self._c.constant("attention.down", np.array([1, 3]))], "down")
        self.new = self._op("GreaterOrEqual", [down, across], "new")
        self._count = self._op("Shape", [positions], "count", start=1, end=2)

    def square(self, heads: int) -> ir.Value:
        """[1, heads, -1, number of new rows] as a shape."""
        front = self._c.constant(f"shape.front.{heads}", np.array([1, heads, -1]))
        return self._op("Concat", [front, self._count], f"square_{heads}", axis=0)

    def _op(self, op_type: str, inputs: list[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        full = f"attention_step/{name}"
        if full not in self._made:
            self._made[full] = self._c.op(op_type, inputs, name, **attributes)
        return self._made[full]

    def _input(self, name: str) -> ir.Value:
        if name not in self._inputs:
            raise BackendError(f"The portable graph has no input {name}: it is not what this version writes.")
        return self._inputs[name]


def _written(attention: ir.Node, index: int) -> tuple[ir.Value, ir.Value]:
    """(cache, new rows) of the TensorScatter that feeds an input of Attention."""
    value = attention.inputs[index]
    scatter = value.producer() if value is not None else None
    if scatter is None or scatter.op_type != "TensorScatter" or None in scatter.inputs[:2]:
        raise BackendError("The portable graph is not what this version writes (a cache write before Attention).")
    cache, rows = scatter.inputs[0], scatter.inputs[1]
    assert cache is not None
    assert rows is not None
    return cache, rows


def _heads_of(attention: ir.Node) -> int:
    """Query heads, from the Reshape that split them."""
    value = attention.inputs[0]
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type == "Reshape" and str(producer.name).endswith("q_heads"):
            shape = producer.inputs[1]
            assert shape is not None
            assert shape.const_value is not None
            return int(shape.const_value.numpy()[2])
        value = producer.inputs[0]
    raise BackendError("The portable graph is not what this version writes (no query heads before Attention).")


def _new_rows(graph: ir.Graph) -> None:
    """A cache output becomes the rows that were to be written; caches that nothing reads are no inputs any more."""
    for node in [node for node in graph if node.op_type == "TensorScatter"]:
        layer, which = str(node.outputs[0].name).split(".")[1:]
        present, new = (names(int(layer))[("key", "value").index(which)] for names in (present_names, new_names))
        rows, cache = node.inputs[1], node.inputs[0]
        assert rows is not None
        assert cache is not None
        assert node.outputs[0].name == present
        written = ir.node("Identity", [rows], name=f"{node.name}/rows")
        graph.insert_before(node, written)
        output = written.outputs[0]
        output.name, output.type = new, ir.TensorType(ir.DataType.FLOAT)
        assert cache.shape is not None
        output.shape = ir.Shape([cache.shape[0], cache.shape[1], "sequence", cache.shape[3]])
        node.outputs[0].replace_all_uses_with(output, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    drop_unused_inputs(graph)
