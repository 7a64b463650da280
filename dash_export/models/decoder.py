"""The dimensions that the supported families share, and the options no family may use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dash_export.errors import CheckpointError
from dash_export.models.fields import flag, positive_float, positive_int, shown
from dash_export.models.rope import MAX_POSITIONS, rope_frequencies
from dash_export.models.spec import DecoderSpec

# Far above any published model, and low enough that an absurd config fails here instead of at an allocation.
MAX_VOCAB = 1 << 22
MAX_HIDDEN = 1 << 17
MAX_INTERMEDIATE = 1 << 19
MAX_LAYERS = 1024
MAX_HEADS = 4096
MAX_HEAD_DIM = 1024


def gated_decoder(
    config: Mapping[str, Any],
    *,
    max_positions: int,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> DecoderSpec:
    """The spec of a config; the keywords are the family's traits and its defaults for keys the config leaves out.

    Raises CheckpointError naming the key that is missing, out of range or not supported.
    """
    _refuse_unsupported(config)
    hidden_size = positive_int(config, "hidden_size", MAX_HIDDEN)
    num_heads = positive_int(config, "num_attention_heads", MAX_HEADS)
    num_kv_heads = positive_int(config, "num_key_value_heads", MAX_HEADS, num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    if config.get("head_dim") is None and head_dim is None:
        if hidden_size % num_heads:
            raise CheckpointError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
        head_dim = hidden_size // num_heads
    head_dim = positive_int(config, "head_dim", MAX_HEAD_DIM, head_dim)
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        raise CheckpointError(
            f"head_dim {head_dim} is not supported; rotary embedding needs an even one up to {MAX_HEAD_DIM}"
        )
    max_positions = positive_int(config, "max_position_embeddings", MAX_POSITIONS, max_positions)
    return DecoderSpec(
        model_type=config["model_type"],
        vocab_size=positive_int(config, "vocab_size", MAX_VOCAB),
        hidden_size=hidden_size,
        intermediate_size=positive_int(config, "intermediate_size", MAX_INTERMEDIATE),
        num_layers=positive_int(config, "num_hidden_layers", MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=max_positions,
        rms_norm_eps=positive_float(config, "rms_norm_eps", 1.0, 1e-6),
        rope_frequencies=rope_frequencies(config, head_dim, max_positions),
        tie_embeddings=flag(config, "tie_word_embeddings"),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
    )


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            "quantization_config: pre-quantised Hugging Face weights are not supported; "
            "supported: float weights, or a GGUF file. Export the original model and quantise in `build`"
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"hidden_act {shown(activation)} is not supported; supported: 'silu'")
    if not flag(config, "is_causal", True):
        raise CheckpointError("is_causal: false (an embedding model) is not supported; supported: causal attention")
    if flag(config, "use_sliding_window"):
        raise CheckpointError("use_sliding_window: true is not supported; supported: full attention in every layer")
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise CheckpointError("layer_types with other kinds than 'full_attention' (sliding windows) are not supported")
