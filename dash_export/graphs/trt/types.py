"""Every float of a graph at 16 bits, but for the few places that need more: norms, logits, damage.

The networks TensorRT builds are strongly typed: what the graph says is what runs, so every conversion is a Cast here.
"""

from __future__ import annotations

import onnx_ir as ir

from dash_export.graphs.compose import add_constant

FLOAT32_OUTPUTS = ("logits", "damage")
FLOAT32 = "float32"
"""Key of a node's `meta` that keeps it at float32."""
_NAMES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}


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
