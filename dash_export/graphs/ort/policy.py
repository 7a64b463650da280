"""The policy inside an engine, at the price of three small nodes.

The portable policy is a dozen nodes and a matrix of its own. Between layers everything it needs is out of the caches,
so what it costs is memory latency: a node costs about a microsecond, a small matrix ten. Two identities make it cheap.
It reads the norm that the layer computes anyway, so that its matrix is packed with Q, K and V:

    RMSNorm_unit(h) @ W = (RMSNorm_unit(h) * gain) @ (W / gain)

and the rest are two Gemms with fused activations:

    damage = softplus(w_out @ relu(actions @ W_actions + (state + b))^T + b_out)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dash_export.errors import BackendError
from dash_export.graphs.compose import add_constant, constant_value
from dash_export.graphs.ort.quantize import CONTRIB
from dash_export.skip_policy import HISTORY

# Below this share of the median gain, dividing by a gain would blow its column up beyond what int8 can hold.
SMALLEST_GAIN = 0.02


def share_norm(graph: ir.Graph) -> None:
    """Let the policy's first projection read the layer's own normed input, where that norm's gain can be divided
    out.
    """
    policy_norm = _node(graph, "policy/norm")
    projection = _node(graph, "policy/state_projection")
    norm = next((node for node in graph if node is not policy_norm and _is_norm_of(node, policy_norm.inputs[0])), None)
    gain, weight = constant_value(norm.inputs[1]) if norm is not None else None, constant_value(projection.inputs[1])
    if norm is None or gain is None or weight is None or np.abs(gain).min() < SMALLEST_GAIN * np.median(np.abs(gain)):
        return
    projection.replace_input_with(0, norm.outputs[0])
    projection.replace_input_with(
        1, add_constant(graph, "policy.state_over_gain", (weight / gain[:, None]).astype(np.float32))
    )
    graph.remove(policy_norm, safe=True)


def fuse_policy(graph: ir.Graph) -> None:
    """The rest of the policy as two Gemms. `actions` becomes [rows, 2] and `damage` [1, rows], rows = batch *
    sequence.
    """
    state = _node(graph, "policy/state_projection").outputs[0]
    constants = {
        name: constant_value(_node(graph, f"policy/{name}").inputs[1])
        for name in ("actions_projection", "biased", "out_projection", "out_biased")
    }
    history, bias, out, out_bias = constants.values()
    assert history is not None
    assert bias is not None
    assert out is not None
    assert out_bias is not None
    end = _node(graph, "policy/damage")
    (actions,) = (value for value in graph.inputs if value.name == "actions")
    rows = ir.node(
        "Reshape", [state, add_constant(graph, "policy.rows", np.array([-1, history.shape[1]]))], name="policy/rows"
    )
    inner = _fused_gemm(
        "policy/inner", [actions, add_constant(graph, "policy.actions", history), rows.outputs[0]], "Relu"
    )
    inputs = [
        add_constant(graph, "policy.out", out.T),
        inner.outputs[0],
        add_constant(graph, "policy.out_bias", out_bias.reshape(1, 1)),
    ]
    damage = _fused_gemm("policy/damage", inputs, "Softplus", transpose=True)
    gone = [
        node
        for node in graph
        if str(node.name).startswith("policy/") and node.name not in ("policy/state_projection", "policy/norm")
    ]
    biased = ir.node("Add", [state, add_constant(graph, "policy.bias", bias)], name="policy/state_projection/bias")
    rows.replace_input_with(0, biased.outputs[0])
    for node in (biased, rows, inner, damage):
        node.outputs[0].name = str(node.name)
    graph.insert_before(end, [biased, rows, inner, damage])
    before, after = end.outputs[0], damage.outputs[0]
    before.name, after.name = "policy/damage~replaced", "damage"
    after.shape, after.type = ir.Shape([1, "rows"]), ir.TensorType(ir.DataType.FLOAT)
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(gone, safe=True)
    actions.shape = ir.Shape(["rows", HISTORY])


def _fused_gemm(name: str, inputs: list[ir.Value], activation: str, transpose: bool = False) -> ir.Node:
    attributes = {"activation": activation, "transB": int(transpose)}
    return ir.node("FusedGemm", inputs, attributes, domain=CONTRIB, name=name)


def _is_norm_of(node: ir.Node, value: ir.Value | None) -> bool:
    return node.op_type == "RMSNormalization" and node.inputs[0] is value


def _node(graph: ir.Graph, name: str) -> ir.Node:
    node = next((node for node in graph if node.name == name), None)
    if node is None:
        raise BackendError(
            f"The portable policy graph has no node {name}: it is not what this version writes. Export the model again."
        )
    return node
