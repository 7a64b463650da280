"""A Hugging Face config, read without trust, as a `DecoderSpec`: its family, dimensions, rotary frequencies, options.

The frequencies are float32 arithmetic in transformers' order: they agree with the ones the model was trained with.
`llama3`: Llama 3.1's `apply_scaling`; `linear`: position interpolation (arXiv 2306.15595).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any, TypeVar

import numpy as np

from dash_export.errors import CheckpointError
from dash_export.manifest import LARGEST
from dash_export.models.spec import DecoderSpec, Float32Array

FAMILIES = ("llama", "qwen2", "qwen3")
"""The `model_type`s that can be exported. A new one is a module of this package with a `decoder(config)`, and its name
here.
"""
MAX_INTERMEDIATE, MAX_FACTOR = 1 << 19, 1e6
SCALINGS = ("default", "linear", "llama3")
_ONLY: dict[str, tuple[object, str]] = {
    "quantization_config": (None, "float weights, or a GGUF file. Export the original model and quantise in `build`"),
    "hidden_act": ("silu", "'silu'"),
    "is_causal": (True, "causal attention (this is an embedding model)"),
    "use_sliding_window": (False, "full attention in every layer"),
}
"""Options with the only value that is supported, and how to say it."""
Number = TypeVar("Number", int, float)


def decoder_spec(config: Mapping[str, Any], name: str = "") -> DecoderSpec:
    """The decoder a config describes, by a `name` without what a terminal would obey. Raises CheckpointError for an
    unknown family or an option.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(f"model_type {shown(family)} is not supported; supported: {', '.join(FAMILIES)}")
    spec: DecoderSpec = import_module(f"dash_export.models.{family}").decoder(config)
    return replace(spec, name="".join(filter(str.isprintable, name)) or "model")


def gated_decoder(
    config: Mapping[str, Any], *, max_positions: int, head_dim: int | None = None, **traits: Any
) -> DecoderSpec:
    """The spec of a config: `traits` are the family's fields of `DecoderSpec`, the other keywords its defaults for keys
    that the config leaves out. A family that takes an option which is refused here reads it and passes the config on
    without it. Raises CheckpointError naming the key that is missing, out of range or not supported.
    """
    for key, (only, supported) in _ONLY.items():
        if (value := config.get(key)) is not None and value != only:
            raise CheckpointError(f"config {key!r} is {shown(value)}, which is not supported; supported: {supported}")
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise CheckpointError("layer_types with other kinds than 'full_attention' (sliding windows) are not supported")
    hidden_size = positive(config, "hidden_size", LARGEST["hidden_size"])
    num_heads = positive(config, "num_attention_heads", LARGEST["num_heads"])
    num_kv_heads = positive(config, "num_key_value_heads", LARGEST["num_kv_heads"], num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(f"num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}")
    if config.get("head_dim") is None and head_dim is None and hidden_size % num_heads:
        raise CheckpointError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
    head_dim = positive(config, "head_dim", LARGEST["head_dim"], head_dim or max(1, hidden_size // num_heads))
    if head_dim % 2:
        raise CheckpointError(f"head_dim {head_dim} is not supported; rotary embedding needs an even one")
    max_positions = positive(config, "max_position_embeddings", LARGEST["max_positions"], max_positions)
    return DecoderSpec(
        model_type=config["model_type"],
        vocab_size=positive(config, "vocab_size", LARGEST["vocab_size"]),
        hidden_size=hidden_size,
        intermediate_size=positive(config, "intermediate_size", MAX_INTERMEDIATE),
        num_layers=positive(config, "num_hidden_layers", LARGEST["num_layers"]),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=max_positions,
        rms_norm_eps=positive(config, "rms_norm_eps", 1.0, 1e-6),
        rope_frequencies=rope_frequencies(config, head_dim, max_positions),
        tie_embeddings=flag(config, "tie_word_embeddings"),
        **traits,
    )


def rope_frequencies(config: Mapping[str, Any], head_dim: int, max_positions: int) -> tuple[float, ...]:
    """Inverse frequencies of `head_dim` dimensions, as in `DecoderSpec`, from `rope_parameters` (transformers 5) or the
    older `rope_theta` and `rope_scaling`. Raises CheckpointError for another scaling.
    """
    # transformers lets an old-style rope_scaling win over rope_parameters; so do we.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(inner, dict) for inner in rope.values()):
        raise CheckpointError(f"config 'rope_parameters' is {shown(rope)}; expected one object for all layer types")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in SCALINGS:
        raise CheckpointError(f"rope type {shown(kind)} is not supported; supported: {', '.join(SCALINGS)}")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial is not None and (isinstance(partial, bool) or partial != 1):
        raise CheckpointError(f"partial_rotary_factor {shown(partial)} is not supported; supported: 1 (whole heads)")
    theta = positive(rope, "rope_theta", 1e12, positive(config, "rope_theta", 1e12, 10_000.0))
    with np.errstate(all="ignore"):
        scaled = base_frequencies(theta, head_dim)
        if kind == "linear":
            scaled = scaled / np.float32(positive(rope, "factor", MAX_FACTOR))
        elif kind == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor")
            factor, low, high = (positive(rope, name, MAX_FACTOR) for name in names)
            if high <= low:
                raise CheckpointError(f"config 'high_freq_factor' is {high:g}; expected above low_freq_factor, {low:g}")
            key = "original_max_position_embeddings"
            # transformers lets this key of the config win over that of the scaling.
            rope = config if config.get(key) is not None else rope
            original = positive(rope, key, LARGEST["max_positions"], max_positions)
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


def positive(config: Mapping[str, Any], key: str, upper: Number, default: Number | None = None) -> Number:
    """`config[key]`, a number in (0, upper], whole where `upper` is; a missing or null key takes `default`. Raises
    CheckpointError for another, and for none without a default.
    """
    value = default if config.get(key) is None else config[key]
    whole = isinstance(upper, int)
    what = "a positive integer" if whole else "a positive number"
    if value is None:
        raise CheckpointError(f"the config lacks {key!r}, {what}")
    # A bool is neither; NaN compares false; float() of a huge integer would overflow.
    if type(value) not in ((int,) if whole else (int, float)) or not 0 < value <= upper:
        limit = str(upper) if whole else f"{upper:g}"
        raise CheckpointError(f"config {key!r} is {shown(value)}; expected {what} of at most {limit}")
    return type(upper)(value)


def flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """`config[key]` as true or false; a missing or null key takes `default`. Raises CheckpointError."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, bool):
        raise CheckpointError(f"config {key!r} is {shown(value)}; expected true or false")
    return value


def shown(value: object) -> str:
    """`value` for an error message, short whatever a hostile file put there."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 64:
        return "a huge integer"  # str() of an integer beyond 4300 digits is an error of its own
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
