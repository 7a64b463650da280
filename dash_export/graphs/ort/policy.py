"""What reads RMSNorm(h) of unit gain - the policy and a low-rank compensation - inside an engine, next to free.

Between layers everything an engine needs is out of the caches, so what a node costs is memory latency: about a
microsecond, a small matrix ten. One identity makes them cheap: they read the norm that the layer computes anyway, so
that their matrices can be packed with Q, K and V:

    RMSNorm_unit(h) @ W = (RMSNorm_unit(h) * gain) @ (W / gain)

A linear policy is then one small product, `score`; the host adds the bias and takes the softplus. One with a hidden
layer ends in two Gemms with fused activations:

    damage = softplus(w_out @ relu(actions @ W_actions + (state + b))^T + b_out)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dash_export.errors import BackendError
from dash_export.graphs.compose import add_constant, constant_value, load_graph
from dash_export.graphs.ort.quantize import CONTRIB
from dash_export.skip_policy import HISTORY

# Below this share of the median gain, dividing by a gain would blow its column up beyond what int8 can hold.
SMALLEST_GAIN = 0.02


def share_norms(graph: ir.Graph) -> None:
    """Let the first projections of the policy and the compensation read the layer's own normed input, where that norm's
    gain can be divided out.
    """
    for node in list(graph):
        if node.op_type == "RMSNormalization" and str(node.name).endswith(("policy/norm", "compensation/norm")):
            _share(graph, node)


def _share(graph: ir.Graph, unit: ir.Node) -> None:
    (projection,) = (usage.node for usage in unit.outputs[0].uses())
    own = (node for node in graph if str(node.name).endswith("input_layernorm") and node.inputs[0] is unit.inputs[0])
    norm = next(own, None)
    gain, weight = constant_value(norm.inputs[1]) if norm is not None else None, constant_value(projection.inputs[1])
    if norm is None or gain is None or weight is None or np.abs(gain).min() < SMALLEST_GAIN * np.median(np.abs(gain)):
        return
    projection.replace_input_with(0, norm.outputs[0])
    over = add_constant(graph, f"{projection.name}.over_gain", (weight / gain[:, None]).astype(np.float32))
    projection.replace_input_with(1, over)
    graph.remove(unit, safe=True)


def fuse_policy(graph: ir.Graph) -> None:
    """The rest of the policy in as few nodes as there are. With a hidden layer or actions, `damage` becomes [1, rows]
    and `actions` [rows, 2], rows = batch * sequence; else the output is `score`, before the bias: [batch, 1,
    sequence] for one layer, [batch, sequence, layers] for several.
    """
    nodes = {str(node.name): node for node in graph if str(node.name).startswith("policy/")}
    projection = nodes["policy/state_projection"]
    end = nodes.get("policy/damage", nodes["policy/softplus"])
    layers = constant_value(projection.inputs[1])
    assert layers is not None
    if {"policy/relu", "policy/sum"}.isdisjoint(nodes):
        score = _score(graph, projection)
        new, output = [score], score.outputs[0]
    else:
        new = _tail(graph, nodes)
        output = new[-1].outputs[0]
    graph.insert_before(end, new)
    end.outputs[0].replace_all_uses_with(output, replace_graph_outputs=True)
    end.outputs[0].name = "policy/damage~replaced"
    linear, count = new[-1].name == "policy/score", layers.shape[1]
    output.name, output.type = "score" if linear else "damage", ir.TensorType(ir.DataType.FLOAT)
    shapes: dict[bool, tuple[int | str, ...]] = {
        True: ("batch", 1, "sequence") if count == 1 else ("batch", "sequence", count),
        False: (1, "rows"),
    }
    output.shape = ir.Shape(shapes[linear])
    kept = ("policy/norm",) if linear else ("policy/norm", projection.name)
    graph.remove([node for name, node in nodes.items() if name not in kept], safe=True)


def _score(graph: ir.Graph, projection: ir.Node) -> ir.Node:
    """state [batch, sequence, hidden] @ columns; one column as row @ state^T, the same numbers in the same order.

    A constant right-hand matrix is packed 16 columns wide, 36 kB to be read for a column of 2; a constant left-hand one
    is read as it is, but of several rows is slow: 14 took 8 us on cold caches where 14 columns took 1.
    """
    source, weight = projection.inputs
    columns = constant_value(weight)
    assert weight is not None
    assert columns is not None
    if columns.shape[1] > 1:
        node = ir.node("MatMul", [source, weight], name="policy/score")
    else:
        row = add_constant(graph, f"{weight.name}.row", columns.T)
        node = ir.node("FusedMatMul", [row, source], {"transB": 1}, domain=CONTRIB, name="policy/score")
    node.outputs[0].name = "policy/score"
    return node


def linear_bias(path: Path, gated: Sequence[int]) -> dict[int, float]:
    """The bias per gated layer of a portable policy graph whose lowering gives a score; else nothing."""
    graph = load_graph(path).graph
    if any(node.name in ("policy/relu", "policy/sum") for node in graph):
        return {}
    bias = constant_value(graph.initializers.get("policy.bias"))
    if bias is None or bias.shape != (len(gated), 1):
        raise BackendError(f"{path} is not a policy graph that this version writes: export the model again.")
    return dict(zip(gated, bias[:, 0].tolist(), strict=True))


def _tail(graph: ir.Graph, nodes: Mapping[str, ir.Node]) -> list[ir.Node]:
    """From the state's projection to damage [1, rows]."""

    def constant(name: str) -> npt.NDArray[np.float32] | None:
        return constant_value(nodes[f"policy/{name}"].inputs[1]) if f"policy/{name}" in nodes else None

    history, bias, out, out_bias = map(constant, ("actions_projection", "biased", "out_projection", "out_biased"))
    assert bias is not None
    state = nodes["policy/state_projection"].outputs[0]
    biased = ir.node("Add", [state, add_constant(graph, "policy.bias", bias)], name="policy/state_projection/bias")
    shape = add_constant(graph, "policy.rows", np.array([-1, bias.shape[-1]]))
    rows = ir.node("Reshape", [biased.outputs[0], shape], name="policy/rows")
    made = [biased, rows]
    if history is not None:
        (actions,) = (value for value in graph.inputs if value.name == "actions")
        actions.shape = ir.Shape(["rows", HISTORY])
        inputs = [actions, add_constant(graph, "policy.actions", history), rows.outputs[0]]
        made.append(_fused_gemm("policy/inner", inputs, "Softplus" if out is None else "Relu"))
    else:
        made.append(ir.node("Relu", [rows.outputs[0]], name="policy/inner"))
    if out is not None and out_bias is not None:
        inputs = [
            add_constant(graph, "policy.out", out.T),
            made[-1].outputs[0],
            add_constant(graph, "policy.out_bias", out_bias.reshape(1, 1)),
        ]
        made.append(_fused_gemm("policy/damage", inputs, "Softplus", transpose=True))
    else:
        made.append(
            ir.node(
                "Reshape",
                [made[-1].outputs[0], add_constant(graph, "policy.row", np.array([1, -1]))],
                name="policy/damage",
            )
        )
    for node in made:
        node.outputs[0].name = str(node.name)
    return made


def _fused_gemm(name: str, inputs: list[ir.Value], activation: str, transpose: bool = False) -> ir.Node:
    attributes = {"activation": activation, "transB": int(transpose)}
    return ir.node("FusedGemm", inputs, attributes, domain=CONTRIB, name=name)
