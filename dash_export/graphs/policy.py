"""The portable policy graph: one graph for every gated layer, the layer is an input.

hidden [batch, sequence, hidden], actions [batch, sequence, 2] float32 (a[l-1], a[l]; 0 run, 1 skip; only where the
network reads them), layer [1] int64 (the gated layer l+1 to decide) -> damage [batch, sequence] float32, nats. `hidden`
is the **input** of the layer before the one decided, or of an earlier one where several are decided at once.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dash_export.graphs.writer import GraphWriter
from dash_export.models.spec import DecoderSpec
from dash_export.skip_policy import HISTORY, SkipPolicy


def policy_graph(spec: DecoderSpec, policy: SkipPolicy) -> ir.Model:
    """The formula of `skip_policy`, with weights gathered by layer."""
    network = policy.network
    assert network is not None
    g = GraphWriter("policy", f"Damage of skipping a gated layer ({policy.origin}).")
    hidden = g.input("hidden", ("batch", "sequence", spec.hidden_size))
    actions = g.input("actions", ("batch", "sequence", HISTORY)) if policy.reads_actions else None
    layer = g.input("layer", (1,), ir.DataType.INT64)

    row_of_layer = np.zeros(spec.num_layers, np.int64)
    row_of_layer[list(policy.gated)] = np.arange(len(policy.gated))
    row = g.op("Gather", [g.initializer("policy.row_of_layer", row_of_layer), layer], "policy/row")

    def weight(name: str, stacked: np.ndarray) -> ir.Value:
        gathered = g.op("Gather", [g.initializer(f"policy.{name}", stacked), row], f"policy/{name}/of_layer")
        return g.op("Squeeze", [gathered, g.initializer("policy.first_axis", np.array([0]))], f"policy/{name}")

    gain = g.initializer("unit_gain", np.ones(spec.hidden_size, np.float32))
    state = g.op("RMSNormalization", [hidden, gain], "policy/norm", epsilon=spec.rms_norm_eps)
    score = g.op("MatMul", [state, weight("state", network["state"])], "policy/state_projection")
    if actions is not None:
        history = g.op("MatMul", [actions, weight("actions", network["actions"])], "policy/actions_projection")
        score = g.op("Add", [score, history], "policy/sum")
    score = g.op("Add", [score, weight("bias", network["bias"])], "policy/biased")
    if "out" in network:
        inner = g.op("Relu", [score], "policy/relu")
        # A column, so that the product is [batch, sequence, 1].
        score = g.op("MatMul", [inner, weight("out", network["out"][:, :, None])], "policy/out_projection")
        score = g.op("Add", [score, weight("out_bias", network["out_bias"][:, None])], "policy/out_biased")
    damage = g.op("Softplus", [score], "policy/softplus")
    damage = g.op("Squeeze", [damage, g.initializer("policy.last_axis", np.array([-1]))], "policy/damage")
    g.output(damage, "damage", ("batch", "sequence"))
    return g.model()
