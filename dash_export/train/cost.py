"""What skipping a unit saves before any engine is built. Decode is bound by memory traffic, so by bytes:

    (layers * a layer's bytes - the bypass's bytes) / (all layers' bytes + the head's)

with 4 bits a weight and 8 in a bypass, as engines for a CPU have them. The cost table of a build measures it.
"""

from __future__ import annotations

from math import prod

from dash_export.models.spec import DecoderSpec
from dash_export.policy import key_value_size

BITS, BYPASS_BITS = 4, 8


def saved(spec: DecoderSpec, layers: int) -> float:
    """Fraction of a token's time, below 0 where the bypass is larger than its layers."""
    weights = {name: prod(shape) for name, shape in spec.weight_shapes().items()}
    layer = sum(count for name, count in weights.items() if name.startswith("model.layers.0."))
    hidden, columns = spec.hidden_size, spec.hidden_size + 2 * key_value_size(spec) * layers
    bypass = hidden * columns
    token = spec.num_layers * layer + spec.vocab_size * hidden
    return (layers * layer * BITS - bypass * BYPASS_BITS) / (token * BITS)
