"""A Hugging Face config, read without trust, as a `DecoderSpec`: family, dimensions, rotary frequencies, options.

The frequencies are computed in float32 and in transformers' order, so that they equal those that the model was trained
with. `llama3` is Llama 3.1's `apply_scaling`, `linear` is position interpolation (arXiv 2306.15595).
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dash_export.core.facts import LARGEST, LARGEST_CONTEXT, Traits
from dash_export.errors import CheckpointError
from dash_export.files.typed_json import shown
from dash_export.models.spec import DecoderSpec, Float32Array

FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "ministral", "gemma2", "gemma3_text", "phi3", "granite", "smollm3", "olmo2"
)  # fmt: skip
"""Every `model_type` that can be exported. A new family is a module of this package, named after its `model_type`, with
a function `decoder(config)`; its name is added here.
"""
ENCODERS = (
    "dinov2", "dinov2_with_registers", "dinov3_vit", "vit", "clip_vision_model", "siglip_vision_model"
)  # fmt: skip
"""Every `model_type` of an image encoder: the same, with a function `encoder(config, size)` (encoders.py)."""
TEXT_ENCODERS = ("bert",)
"""The same for texts, with a function `encoder(config)`."""
MAX_INTERMEDIATE, MAX_FACTOR = 1 << 19, 1e6
MAX_ROPE_BYTES = 1 << 30
"""Bytes of sines and cosines: those of Mistral Nemo, with a million positions, have 524 MB."""
SCALINGS = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
FULL, SLIDING = "full_attention", "sliding_attention"
_CAUSAL = "causal attention (this is an embedding model; text encoders that are supported: bert)"
_ONLY: dict[str, tuple[object, str]] = {
    "quantization_config": (None, "float weights, or a GGUF file. Export the original model and quantise in `build`"),
    "is_causal": (True, _CAUSAL),
    "use_bidirectional_attention": (False, _CAUSAL),
}
"""Option -> (the only value that is supported, words for that value in an error message)."""
_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
_ORIGINAL = "original_max_position_embeddings"
PLAIN = Traits()
Config = Mapping[str, Any]
"""A config.json, read without trust."""
Number = TypeVar("Number", int, float)


def decoder_spec(config: Config, name: str = "") -> DecoderSpec:
    """Return the decoder that a config describes. Its `name` loses all unprintable characters, which a terminal could
    obey. Raises CheckpointError for an unknown family or an unsupported option.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        known = ", ".join((*FAMILIES, *ENCODERS, *TEXT_ENCODERS))
        raise CheckpointError(f"model_type {shown(family)} is not supported; supported: {known}")
    spec: DecoderSpec = import_module(f"dash_export.models.families.{family}").decoder(config)
    return replace(spec, name="".join(filter(str.isprintable, name)) or "model")


def gated_decoder(
    config: Config,
    *,
    max_positions: int,
    head_dim: int | None = None,
    windows: tuple[int, ...] | None = None,
    partial_rotary: bool = False,
    rope: Config | None = None,
    traits: Traits = PLAIN,
    biases: Collection[str] = (),
    tied: bool = False,
    **fields: Any,
) -> DecoderSpec:
    """Return the spec of a config. Raises CheckpointError naming the key that is missing, out of range or unsupported.

    The family gives `traits`, other `fields` of `DecoderSpec`, and its defaults `max_positions` and `head_dim` for keys
    that the config lacks. `windows`: attention windows of its layers (None: the family has none). `partial_rotary`: the
    family may rotate only a part of each head. `rope`: RoPE parameters of the layers without a window, for a family
    whose config does not give them under the usual keys. `biases`: the options that the family has, of `attention_bias`
    (all four projections of attention) and `mlp_bias`. `tied`: its default for `tie_word_embeddings`.
    """
    own = _ACTIVATIONS[traits.activation]
    for key, (only, supported) in (
        _ONLY | dict.fromkeys(("hidden_act", "hidden_activation"), (own, repr(own)))
    ).items():
        if (value := config.get(key)) is not None and value != only:
            raise CheckpointError(f"config {key!r} is {shown(value)}, which is not supported; supported: {supported}")
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
    rotary = rotary_embedding(config, head_dim, max_positions, rope, partial_rotary)
    if rotary.positions < 2:
        raise CheckpointError("a context of 1 token (max_position_embeddings) leaves no room for an answer")
    turned = len(rotary.frequencies) + len(fields.get("window_frequencies", ()))
    if (size := 8 * turned * rotary.positions) > MAX_ROPE_BYTES:
        raise CheckpointError(
            f"RoPE tables for {rotary.positions} positions take {size >> 20} MB, over {MAX_ROPE_BYTES >> 20}: set a "
            "lower max_position_embeddings (a GGUF file's context_length)"
        )
    windows = attention_windows(config) if windows is None else windows
    if not traits.window_rope and all(not window or window >= rotary.positions for window in windows):
        windows = ()  # no query ever is so far from a key
    attention_bias, mlp_bias = (name in biases and flag(config, name) for name in ("attention_bias", "mlp_bias"))
    return DecoderSpec(
        model_type=config["model_type"],
        vocab_size=positive(config, "vocab_size", LARGEST["vocab_size"]),
        hidden_size=hidden_size,
        intermediate_size=positive(config, "intermediate_size", MAX_INTERMEDIATE),
        num_layers=positive(config, "num_hidden_layers", LARGEST["num_layers"]),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=rotary.positions,
        rms_norm_eps=positive(config, "rms_norm_eps", 1.0, 1e-6),
        rope_frequencies=rotary.frequencies,
        rope_scale=rotary.scale,
        traits=replace(traits, windows=windows),
        tie_embeddings=flag(config, "tie_word_embeddings", tied),
        output_bias=attention_bias,
        mlp_bias=mlp_bias,
        **({"qkv_bias": attention_bias} | fields),
    )


def attention_windows(
    config: Config, has_window: Callable[[int], bool] | None = None, default: int | None = None, switched: bool = False
) -> tuple[int, ...]:
    """Return, per layer, how many tokens a query may attend to (0: all of them), or () when no layer has a window. The
    layers with a window are named by `layer_types`, or else by the family's `has_window` (None: the family has none).
    `default`: a window, in tokens, for a config without `sliding_window` (null: no window). `switched`: windows only
    where `use_sliding_window` is set. Raises CheckpointError for wrong options, and where windows are asked for and
    there are none.
    """
    layers = positive(config, "num_hidden_layers", LARGEST["num_layers"])
    used = has_window is not None and (not switched or flag(config, "use_sliding_window"))
    window = 0
    if used and config.get("sliding_window", default) is not None:
        window = positive(config, "sliding_window", LARGEST_CONTEXT, default)
    kinds = config.get("layer_types") or [SLIDING if has_window and has_window(at) else FULL for at in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(one not in (FULL, SLIDING) for one in kinds):
        raise CheckpointError(f"config 'layer_types' must name {FULL!r} or {SLIDING!r} for each of {layers} layers")
    if not window and (config.get("use_sliding_window") or SLIDING in (config.get("layer_types") or ())):
        raise CheckpointError("use_sliding_window and layer_types ask for a window, and there is none (sliding_window)")
    return tuple(window * (one == SLIDING) for one in kinds) if window and SLIDING in kinds else ()


class Rotary(NamedTuple):
    """Inverse frequencies, the factor of sines and cosines, and the number of positions for which both are valid."""

    frequencies: tuple[float, ...]
    scale: float
    positions: int


def rotary_embedding(
    config: Config, head_dim: int, max_positions: int, rope: Config | None = None, partial: bool = False
) -> Rotary:
    """Return the rotary embedding as in `DecoderSpec`, from `rope` or else `rope_parameters` (transformers 5) or the
    older `rope_theta` and `rope_scaling`. `partial`: the family may rotate only a part of each head. Raises
    CheckpointError for another scaling.

    A `dynamic` model has plain frequencies within its context, a `longrope` model its short ones within its original
    context: the model is exported with that context. A `yarn` model's context is at least `factor` times its original
    one.
    """
    # transformers lets an old-style rope_scaling win over rope_parameters; so do we.
    rope = rope or config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(inner, dict) for inner in rope.values()):
        raise CheckpointError(f"config 'rope_parameters' is {shown(rope)}; expected one object for all layer types")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "su" or (kind == "yarn" and "short_factor" in rope):  # its names in the first Phi-3 configs
        kind = "longrope"
    if kind not in SCALINGS:
        raise CheckpointError(f"rope type {shown(kind)} is not supported; supported: {', '.join(SCALINGS)}")
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share is not None and (isinstance(share, bool) or share != 1):
        if not partial:
            raise CheckpointError(f"partial_rotary_factor {shown(share)} is not supported; supported: 1 (whole heads)")
        head_dim = int(head_dim * positive({"partial_rotary_factor": share}, "partial_rotary_factor", 1.0))
        if head_dim % 2 or not head_dim:
            raise CheckpointError(f"partial_rotary_factor {shown(share)} turns {head_dim} dimensions of a head")
    theta = positive(rope, "rope_theta", 1e12, positive(config, "rope_theta", 1e12, 10_000.0))
    # transformers lets this key of the config win over the same key of the scaling.
    own = config if config.get(_ORIGINAL) is not None else rope
    original = positive(own, _ORIGINAL, LARGEST["max_positions"], max_positions)
    scale = 1.0
    with np.errstate(all="ignore"):
        scaled = base_frequencies(theta, head_dim)
        if kind == "linear":
            scaled = scaled / np.float32(positive(rope, "factor", MAX_FACTOR))
        elif kind == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor")
            factor, low, high = (positive(rope, name, MAX_FACTOR) for name in names)
            if high <= low:
                raise CheckpointError(f"config 'high_freq_factor' is {high:g}; expected above low_freq_factor, {low:g}")
            scaled = llama3_frequencies(scaled, factor, low, high, original)
        elif kind == "yarn":
            factor = positive(rope, "factor", MAX_FACTOR, max_positions / original)
            scaled, scale = _yarn(rope, scaled, theta, factor, original)
            # Where the folder was given a scaling by hand (Qwen 2.5's cards say how), its context is still the old one.
            max_positions = min(LARGEST_CONTEXT, max(max_positions, int(factor * original)))
        elif kind == "longrope":
            divisors = rope.get("short_factor")
            if not isinstance(divisors, list) or len(divisors) != len(scaled):
                raise CheckpointError(f"config 'short_factor' is {shown(divisors)}; expected {len(scaled)} numbers")
            scaled = scaled / np.array(
                [positive({"short_factor": one}, "short_factor", MAX_FACTOR) for one in divisors]
            )
            factor = positive(rope, "factor", MAX_FACTOR, max(1.0, max_positions / original))
            grown = math.sqrt(1 + math.log(max(1.0, factor)) / math.log(max(2, original)))
            scale, max_positions = positive(rope, "attention_factor", MAX_FACTOR, grown), min(max_positions, original)
    if not np.isfinite(scaled).all():
        raise CheckpointError(f"the rope parameters give frequencies that are not finite (rope_theta {theta:g})")
    return Rotary(tuple(scaled.tolist()), scale, max_positions)


def _yarn(rope: Config, plain: Float32Array, theta: float, factor: float, original: int) -> tuple[Float32Array, float]:
    """Return (frequencies, factor of sines and cosines) of YaRN (arXiv 2309.00071)."""

    def grown(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    if theta <= 1:
        raise CheckpointError(f"config 'rope_theta' is {theta:g}; yarn's must be above 1")
    scales = [positive(rope, name, MAX_FACTOR) for name in ("mscale", "mscale_all_dim") if rope.get(name)]
    default = grown(scales[0]) / grown(scales[1]) if len(scales) == 2 else grown(1.0)
    dims = 2 * len(plain)
    turns = (positive(rope, name, MAX_FACTOR, value) for name, value in (("beta_fast", 32.0), ("beta_slow", 1.0)))
    low, high = (dims * math.log(original / (2 * math.pi * each)) / (2 * math.log(theta)) for each in turns)
    if flag(rope, "truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    width = high - low or 0.001
    ramp = np.clip((np.arange(len(plain), dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    frequencies: Float32Array = plain / np.float32(factor) * ramp + plain * (1 - ramp)
    return frequencies, positive(rope, "attention_factor", MAX_FACTOR, default)


def base_frequencies(theta: float, head_dim: int) -> Float32Array:
    """Return theta^(-2i / head_dim) as float32 [head_dim / 2] (RoFormer, arXiv 2104.09864)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies: Float32Array = np.float32(1) / np.power(np.float32(theta), exponents)
    return frequencies


def llama3_frequencies(plain: Float32Array, factor: float, low: float, high: float, original: float) -> Float32Array:
    """Scale float32 [n] frequencies as Llama 3.1 does: long waves by 1 / `factor`, short ones kept, a ramp between."""
    wavelengths = np.float32(2 * math.pi) / plain
    smooth = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    ramp = (1 - smooth) * (plain / np.float32(factor)) + smooth * plain
    scaled = np.where(wavelengths > original / low, plain / np.float32(factor), plain)
    middle = (wavelengths <= original / low) & (wavelengths >= original / high)
    return np.where(middle, ramp, scaled).astype(np.float32)


def section(config: Config, key: str) -> dict[str, Any]:
    """Return the object under a key of the config, {} where there is none. Raises CheckpointError for anything else."""
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"config {key!r} is {shown(found)}; expected an object")
    return dict(found)


_LEAST = 1e-30
"""Bound that every float of a config must exceed: some of them are divisors."""


def positive(config: Config, key: str, upper: Number, default: Number | None = None) -> Number:
    """Return `config[key]`, a number in (0, upper], which must be an integer if `upper` is one. A missing or null key
    takes `default`. Raises CheckpointError for any other value, and for a missing key without a default.
    """
    value = default if config.get(key) is None else config[key]
    whole = isinstance(upper, int)
    what = "a positive integer" if whole else "a positive number"
    if value is None:
        raise CheckpointError(f"the config lacks {key!r}, {what}")
    # type() refuses a bool, the comparison refuses NaN and a huge integer, which float() could not convert.
    if type(value) not in ((int,) if whole else (int, float)) or not (0 if whole else _LEAST) < value <= upper:
        limit = str(upper) if whole else f"{upper:g}"
        raise CheckpointError(f"config {key!r} is {shown(value)}; expected {what} of at most {limit}")
    return type(upper)(value)


def flag(config: Config, key: str, default: bool = False) -> bool:
    """Return `config[key]` as a bool. A missing or null key takes `default`. Raises CheckpointError otherwise."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, bool):
        raise CheckpointError(f"config {key!r} is {shown(value)}; expected true or false")
    return value
