"""The dimensions that the supported families share, and the options no family may use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dash_export.errors import CheckpointError
from dash_export.manifest import LARGEST
from dash_export.models.fields import flag, positive_float, positive_int, shown
from dash_export.models.rope import rope_frequencies
from dash_export.models.spec import DecoderSpec

MAX_INTERMEDIATE = 1 << 19
_ONLY: dict[str, tuple[object, str]] = {
    "quantization_config": (None, "float weights, or a GGUF file. Export the original model and quantise in `build`"),
    "hidden_act": ("silu", "'silu'"),
    "is_causal": (True, "causal attention (this is an embedding model)"),
    "use_sliding_window": (False, "full attention in every layer"),
}
"""Options with the only value that is supported, and how to say it."""


def gated_decoder(
    config: Mapping[str, Any], *, max_positions: int, head_dim: int | None = None, **traits: Any
) -> DecoderSpec:
    """The spec of a config: `traits` are the family's fields of `DecoderSpec`, the other keywords its defaults for keys
    that the config leaves out. Raises CheckpointError naming the key that is missing, out of range or not supported.
    """
    for key, (only, supported) in _ONLY.items():
        if (value := config.get(key)) is not None and value != only:
            raise CheckpointError(f"config {key!r} is {shown(value)}, which is not supported; supported: {supported}")
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise CheckpointError("layer_types with other kinds than 'full_attention' (sliding windows) are not supported")
    hidden_size = positive_int(config, "hidden_size", LARGEST["hidden_size"])
    num_heads = positive_int(config, "num_attention_heads", LARGEST["num_heads"])
    num_kv_heads = positive_int(config, "num_key_value_heads", LARGEST["num_kv_heads"], num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(f"num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}")
    if config.get("head_dim") is None and head_dim is None and hidden_size % num_heads:
        raise CheckpointError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
    equal_share = max(1, hidden_size // num_heads)
    head_dim = positive_int(config, "head_dim", LARGEST["head_dim"], head_dim or equal_share)
    if head_dim % 2:
        raise CheckpointError(f"head_dim {head_dim} is not supported; rotary embedding needs an even one")
    max_positions = positive_int(config, "max_position_embeddings", LARGEST["max_positions"], max_positions)
    return DecoderSpec(
        model_type=config["model_type"],
        vocab_size=positive_int(config, "vocab_size", LARGEST["vocab_size"]),
        hidden_size=hidden_size,
        intermediate_size=positive_int(config, "intermediate_size", MAX_INTERMEDIATE),
        num_layers=positive_int(config, "num_hidden_layers", LARGEST["num_layers"]),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=max_positions,
        rms_norm_eps=positive_float(config, "rms_norm_eps", 1.0, 1e-6),
        rope_frequencies=rope_frequencies(config, head_dim, max_positions),
        tie_embeddings=flag(config, "tie_word_embeddings"),
        **traits,
    )
