"""Lowering of an encoder's graphs for TensorRT: no cache, no mask, no positions, and any number of inputs at a time."""

import math

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from dash_export.core.facts import EncoderFacts
from dash_export.graphs.lower.trt_decompose import FLOAT32, IR_VERSION, OPSET, Chain, rotary

EXACT = ("policy", "bypass")
"""Beginnings of the names of graphs that compute in float32: their distances and damages meet limits."""


def lower_encoder(model: ir.Model, facts: EncoderFacts, dialect: str) -> None:
    """Lower a segment, exit or policy of an encoder in place, all but its types."""
    graph = model.graph
    if facts.tokens:  # as many in every picture
        for value in (*graph.inputs, *graph.outputs):
            if value.shape is not None and len(value.shape) == 3:
                value.shape = ir.Shape([value.shape[0], facts.tokens, value.shape[2]])
    if str(graph.name).startswith(EXACT):
        for node in graph:
            node.meta[FLOAT32] = True
    for node in [node for node in graph if node.op_type == "Attention"]:
        # TensorRT-RTX 1.7 has no kernel for the one query that pools, and cannot decompose it itself.
        if dialect == "trt10" or str(node.name).startswith("pool/"):
            _attention(Chain(graph, node, str(node.name)), node, facts.head_dim)
    if dialect == "trt10":
        _lower_opset(model)


def _lower_opset(model: ir.Model) -> None:
    """Replace what is left of opset 23 and 24 by operators of opset 21."""
    graph = model.graph
    for node in [node for node in graph if node.op_type == "RotaryEmbedding"]:
        c, heads = Chain(graph, node, str(node.name)), node.attributes["num_heads"].as_int()
        value, *tables = node.inputs
        turned = c.op("RotaryEmbedding", [_heads(c, value, heads, "value"), *tables], "turned")
        c.finish(_together(c, turned))
        rotary(graph, turned.producer())  # type: ignore[arg-type]
    RemoveUnusedNodesPass()(model)
    graph.opset_imports[""], model.ir_version = OPSET, IR_VERSION


def _attention(c: Chain, node: ir.Node, head_dim: int) -> None:
    """Decompose attention of [batch, tokens, hidden]: softmax(q k / sqrt(head_dim)) v, head by head."""
    heads = node.attributes["q_num_heads"].as_int()
    scale = np.array([1 / math.sqrt(head_dim)], np.float32)
    scaled = c.op("Mul", [node.inputs[0], c.constant(f"attention.scale.{scale[0]:g}", scale)], "scaled")
    queries, keys, values = (
        _heads(c, value, heads, name)
        for name, value in zip("qkv", (scaled, *node.inputs[1:]), strict=True)
    )  # fmt: skip
    scores = c.op("MatMul", [queries, c.op("Transpose", [keys], "columns", perm=[0, 1, 3, 2])], "scores")
    wide = Chain(c.graph, node, c.name, float32=True)
    shares = wide.op("Softmax", [scores], "shares", axis=-1)
    c.finish(_together(c, c.op("MatMul", [shares, values], "mixed")))


def _heads(c: Chain, value: ir.Value | None, heads: int, name: str) -> ir.Value:
    """Return [batch, tokens, hidden] as [batch, heads, tokens, head_dim]."""
    apart = c.op("Reshape", [value, c.constant(f"shape.apart.{heads}", [0, 0, heads, -1])], f"{name}/apart")
    return c.op("Transpose", [apart], f"{name}/heads", perm=[0, 2, 1, 3])


def _together(c: Chain, value: ir.Value) -> ir.Value:
    """Return [batch, heads, tokens, head_dim] as [batch, tokens, hidden]."""
    rows = c.op("Transpose", [value], "rows", perm=[0, 2, 1, 3])
    return c.op("Reshape", [rows, c.constant("shape.together", [0, 0, -1])], "together")
