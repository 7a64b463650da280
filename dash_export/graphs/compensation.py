"""Compensation inside a skip graph: the cheap estimate of the update that the skipped layer would have added."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dash_export.graphs.writer import GraphWriter
from dash_export.models.spec import DecoderSpec
from dash_export.skip_policy import SkipPolicy


def add_compensation(
    g: GraphWriter, spec: DecoderSpec, policy: SkipPolicy, layer: int, name: str, hidden: ir.Value
) -> ir.Value:
    """hidden + compensation(hidden), [batch, sequence, hidden]; `scale`: factor * h, `low_rank`: RMSNorm(h) @ down @
    up.
    """
    compensation, row = policy.compensation, policy.gated.index(layer)
    if compensation.kind == "none":
        return g.op("Identity", [hidden], f"{name}/pass")
    if compensation.kind == "scale":
        factor = g.initializer(f"{name}.factor", compensation.weights["factor"][row].reshape(1))
        update = g.op("Mul", [hidden, factor], f"{name}/compensation/scale")
    else:
        gain = g.initializer("unit_gain", np.ones(spec.hidden_size, np.float32))
        update = g.op("RMSNormalization", [hidden, gain], f"{name}/compensation/norm", epsilon=spec.rms_norm_eps)
        for factor_name in ("down", "up"):
            factor = g.initializer(
                f"{name}.{factor_name}", np.ascontiguousarray(compensation.weights[factor_name][row])
            )
            update = g.op("MatMul", [update, factor], f"{name}/compensation/{factor_name}")
    return g.op("Add", [hidden, update], f"{name}/compensation/add")
