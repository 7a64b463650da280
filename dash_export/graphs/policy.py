"""The portable policy graph: hidden [batch, sequence, hidden] -> damage [batch, sequence, units] float32, nats.
`hidden` is what enters the policy's layer `read`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dash_export.graphs.writer import GraphWriter
from dash_export.models.spec import DecoderSpec
from dash_export.policy import SkipPolicy


def policy_graph(spec: DecoderSpec, policy: SkipPolicy) -> ir.Model:
    """The formula of `dash_export/policy.py`."""
    network = policy.network
    assert network is not None
    g = GraphWriter("policy", f"Damage of skipping each unit ({policy.origin}).")
    hidden = g.input("hidden", ("batch", "sequence", spec.hidden_size))
    gain = g.initializer("unit_gain", np.ones(spec.hidden_size, np.float32))
    state = g.op("RMSNormalization", [hidden, gain], "policy/norm", epsilon=spec.rms_norm_eps)
    score = g.op("MatMul", [state, g.initializer("policy.weight", network["weight"])], "policy/score")
    score = g.op("Add", [score, g.initializer("policy.bias", network["bias"])], "policy/biased")
    g.output(g.op("Softplus", [score], "policy/damage"), "damage", ("batch", "sequence", len(policy.units)))
    return g.model()
