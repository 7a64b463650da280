"""Rotary frequencies from a config: `rope_parameters` (transformers 5) or the older `rope_theta` + `rope_scaling`.

The arithmetic is float32 in transformers' order: the frequencies agree with the ones the model was trained with.
`llama3`: Llama 3.1's `apply_scaling`; `linear`: position interpolation (arXiv 2306.15595).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dash_export.errors import CheckpointError
from dash_export.manifest import LARGEST_CONTEXT
from dash_export.models.fields import positive_float, positive_int, shown
from dash_export.models.spec import Float32Array

MAX_FACTOR = 1e6
SCALINGS = ("default", "linear", "llama3")


def rope_frequencies(config: Mapping[str, Any], head_dim: int, max_positions: int) -> tuple[float, ...]:
    """Inverse frequencies of `head_dim` dimensions, as in `DecoderSpec`. Raises CheckpointError for another scaling."""
    rope = _parameters(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in SCALINGS:
        raise CheckpointError(f"rope type {shown(kind)} is not supported; supported: {', '.join(SCALINGS)}")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial is not None and (isinstance(partial, bool) or partial != 1):
        raise CheckpointError(f"partial_rotary_factor {shown(partial)} is not supported; supported: 1 (whole heads)")
    theta = positive_float(rope, "rope_theta", 1e12, positive_float(config, "rope_theta", 1e12, 10_000.0))
    with np.errstate(all="ignore"):
        scaled = base_frequencies(theta, head_dim)
        if kind == "linear":
            scaled = scaled / np.float32(positive_float(rope, "factor", MAX_FACTOR))
        elif kind == "llama3":
            factor, low, high = (
                positive_float(rope, key, MAX_FACTOR) for key in ("factor", "low_freq_factor", "high_freq_factor")
            )
            if high <= low:
                raise CheckpointError(
                    f"config 'high_freq_factor' is {high:g}; expected above 'low_freq_factor', {low:g}"
                )
            # transformers lets this key of the config win over that of the scaling.
            key = "original_max_position_embeddings"
            original = positive_int(
                config if config.get(key) is not None else rope, key, LARGEST_CONTEXT, max_positions
            )
            scaled = llama3_frequencies(scaled, factor, low, high, original)
    if not np.isfinite(scaled).all():
        raise CheckpointError(f"the rope parameters give frequencies that are not finite (rope_theta {theta:g})")
    return tuple(scaled.tolist())


def base_frequencies(theta: float, head_dim: int) -> Float32Array:
    """theta^(-2i / head_dim) as float32 [head_dim / 2] (RoFormer, arXiv 2104.09864)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies: Float32Array = np.float32(1) / np.power(np.float32(theta), exponents)
    return frequencies


def llama3_frequencies(plain: Float32Array, factor: float, low: float, high: float, original: float) -> Float32Array:
    """Llama 3.1's scaling of float32 [n] frequencies: long waves divided by `factor`, short kept, a ramp between."""
    wavelengths = np.float32(2 * math.pi) / plain
    smooth = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    ramp = (1 - smooth) * (plain / np.float32(factor)) + smooth * plain
    scaled = np.where(wavelengths > original / low, plain / np.float32(factor), plain)
    middle = (wavelengths <= original / low) & (wavelengths >= original / high)
    return np.where(middle, ramp, scaled).astype(np.float32)


def _parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    # transformers lets an old-style rope_scaling win over rope_parameters; so do we.
    for key in ("rope_scaling", "rope_parameters"):
        if value := config.get(key):
            if not isinstance(value, dict):
                raise CheckpointError(f"config {key!r} is {shown(value)}; expected an object with rope_type")
            if any(isinstance(inner, dict) for inner in value.values()):
                raise CheckpointError(f"config {key!r} differs by layer type; supported: one rope for all layers")
            return value
    return {}
