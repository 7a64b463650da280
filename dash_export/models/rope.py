"""Rotary frequencies from a config: `rope_parameters` (transformers 5) or the older `rope_theta` + `rope_scaling`.

The arithmetic is float32 in transformers' order: the frequencies agree with the ones the model was trained with.
`llama3`: Llama 3.1's `apply_scaling`; `linear`: position interpolation (arXiv 2306.15595).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.errors import CheckpointError
from dash_export.manifest import LARGEST_CONTEXT
from dash_export.models.fields import positive_float, positive_int, shown
from dash_export.models.spec import Float32Array

MAX_FACTOR = 1e6
MAX_POSITIONS = LARGEST_CONTEXT


def rope_frequencies(config: Mapping[str, Any], head_dim: int, max_positions: int) -> tuple[float, ...]:
    """Inverse frequencies of `head_dim` dimensions, as in `DecoderSpec`. Raises CheckpointError for another scaling."""
    parameters = _parameters(config)
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in _SCALINGS:
        raise CheckpointError(f"rope type {shown(rope_type)} is not supported; supported: {', '.join(_SCALINGS)}")
    # transformers lets this key of the config win over that of the scaling.
    if (original := config.get("original_max_position_embeddings")) is not None:
        parameters = {**parameters, "original_max_position_embeddings": original}
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial is not None and (isinstance(partial, bool) or partial != 1):
        raise CheckpointError(f"partial_rotary_factor {shown(partial)} is not supported; supported: 1 (whole heads)")
    theta = positive_float(parameters, "rope_theta", 1e12, positive_float(config, "rope_theta", 1e12, 10_000.0))
    with np.errstate(all="ignore"):
        scaled = _SCALINGS[rope_type](base_frequencies(theta, head_dim), parameters, max_positions)
    if not np.isfinite(scaled).all():
        raise CheckpointError(f"the rope parameters give frequencies that are not finite (rope_theta {theta:g})")
    return tuple(scaled.tolist())


def base_frequencies(theta: float, head_dim: int) -> Float32Array:
    """theta^(-2i / head_dim) as float32 [head_dim / 2] (RoFormer, arXiv 2104.09864)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return _divided(np.ones_like(exponents), np.power(np.float32(theta), exponents))


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
        value = config.get(key)
        if value:
            if not isinstance(value, dict):
                raise CheckpointError(f"config {key!r} is {shown(value)}; expected an object with rope_type")
            if any(isinstance(inner, dict) for inner in value.values()):
                raise CheckpointError(f"config {key!r} differs by layer type; supported: one rope for all layers")
            checked: Mapping[str, Any] = value
            return checked
    return {}


def _default(plain: Float32Array, _parameters: Mapping[str, Any], _max_positions: int) -> Float32Array:
    return plain


def _linear(plain: Float32Array, parameters: Mapping[str, Any], _max_positions: int) -> Float32Array:
    return _divided(plain, np.float32(positive_float(parameters, "factor", MAX_FACTOR)))


def _llama3(plain: Float32Array, parameters: Mapping[str, Any], max_positions: int) -> Float32Array:
    factor = positive_float(parameters, "factor", MAX_FACTOR)
    low = positive_float(parameters, "low_freq_factor", MAX_FACTOR)
    high = positive_float(parameters, "high_freq_factor", MAX_FACTOR)
    if high <= low:
        raise CheckpointError(f"config 'high_freq_factor' is {high:g}; expected more than 'low_freq_factor' ({low:g})")
    original = positive_int(parameters, "original_max_position_embeddings", MAX_POSITIONS, max_positions)
    return llama3_frequencies(plain, factor, low, high, original)


def _divided(frequencies: Float32Array, divisors: npt.ArrayLike) -> Float32Array:
    quotients: Float32Array = np.divide(frequencies, divisors, dtype=np.float32)
    return quotients


_SCALINGS: dict[str, Callable[[Float32Array, Mapping[str, Any], int], Float32Array]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
}
