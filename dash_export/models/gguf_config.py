"""GGUF metadata -> the Hugging Face config the model would have had: both kinds of checkpoint share the family code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dash_export.errors import CheckpointError
from dash_export.models.decoder import MAX_HEAD_DIM, MAX_HEADS, MAX_HIDDEN, MAX_INTERMEDIATE, MAX_LAYERS
from dash_export.models.fields import positive_float, positive_int, shown
from dash_export.models.gguf_file import GgufFile
from dash_export.models.registry import supported_model_types
from dash_export.models.rope import MAX_POSITIONS, base_frequencies, llama3_frequencies
from dash_export.models.spec import Float32Array

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Llama 3.1's numbers, the same in every release; GGUF keeps only the divisors that follow from them.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def config_from_gguf(file: GgufFile, rope_factors: Float32Array | None) -> dict[str, Any]:
    """The config of a GGUF file; `rope_factors` is its `rope_freqs.weight`, float32 [head_dim / 2], if it has one.

    Raises CheckpointError for an unknown architecture, and for metadata that is missing or of the wrong type.
    """
    metadata = file.metadata
    model_type = metadata.get("general.architecture")
    if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
        raise CheckpointError(
            f"GGUF architecture {shown(model_type)} is not supported; supported: {', '.join(supported_model_types())}"
        )
    _refuse_unsupported(metadata, model_type)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path} lacks the tensor token_embd.weight (a vocabulary-only or adapter file?)")
    hidden_size = positive_int(metadata, f"{model_type}.embedding_length", MAX_HIDDEN)
    num_heads = positive_int(metadata, f"{model_type}.attention.head_count", MAX_HEADS)
    # The defaults of both are llama.cpp's.
    equal_share = max(1, hidden_size // num_heads)
    head_dim = positive_int(metadata, f"{model_type}.attention.key_length", MAX_HEAD_DIM, equal_share)
    rope_dim = positive_int(metadata, f"{model_type}.rope.dimension_count", MAX_HEAD_DIM, head_dim)
    if positive_int(metadata, f"{model_type}.attention.value_length", MAX_HEAD_DIM, head_dim) != head_dim:
        raise CheckpointError(f"{file.path} has values and keys of different length, which is not supported")
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": positive_int(metadata, f"{model_type}.feed_forward_length", MAX_INTERMEDIATE),
        "num_hidden_layers": positive_int(metadata, f"{model_type}.block_count", MAX_LAYERS),
        "num_attention_heads": num_heads,
        "num_key_value_heads": positive_int(metadata, f"{model_type}.attention.head_count_kv", MAX_HEADS, num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": positive_int(metadata, f"{model_type}.context_length", MAX_POSITIONS),
        "rms_norm_eps": positive_float(metadata, f"{model_type}.attention.layer_norm_rms_epsilon", 1.0),
        "rope_parameters": _rope(metadata, model_type, head_dim, rope_factors),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": model_type != "qwen2" and "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "dtype": "float32",
    }
    if rope_dim != head_dim:
        config["partial_rotary_factor"] = rope_dim / head_dim  # the family refuses it and says why
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        if (token := token_id(metadata, key)) is not None:
            config[f"{name}_token_id"] = token
    return config


def token_id(metadata: Mapping[str, Any], name: str) -> int | None:
    """`tokenizer.ggml.<name>_token_id`, checked against the vocabulary, or None. Raises CheckpointError."""
    key = f"tokenizer.ggml.{name}_token_id"
    value, tokens = metadata.get(key), metadata.get("tokenizer.ggml.tokens")
    if value is None:
        return None
    count = len(tokens) if isinstance(tokens, list) else 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise CheckpointError(f"{key} is {shown(value)}; expected the index of one of the {count} tokens")
    return value


_KNOWN = {
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "tensor_data_layout"),
    *(f"attention.{name}" for name in ("head_count", "head_count_kv", "key_length", "value_length")),
    *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scale_linear"),
    *(f"rope.scaling.{name}" for name in ("type", "factor", "original_context_length", "finetuned")),
}
"""Keys of an architecture that are read, or that change nothing."""


def _refuse_unsupported(metadata: Mapping[str, Any], model_type: str) -> None:
    if metadata.get("general.type", "model") != "model":
        raise CheckpointError(f"the GGUF file is a {shown(metadata['general.type'])}; expected a model")
    if metadata.get(f"{model_type}.expert_count"):
        raise CheckpointError("mixture-of-experts models (expert_count) are not supported; supported: dense decoders")
    if metadata.get(f"{model_type}.attention.sliding_window"):
        raise CheckpointError("attention.sliding_window is not supported; supported: full attention in every layer")
    if not metadata.get(f"{model_type}.attention.causal", True):
        raise CheckpointError("attention.causal = false is not supported; supported: causal attention")
    shards = metadata.get("split.count", 0)
    if not isinstance(shards, int) or shards > 1:
        raise CheckpointError(
            f"the GGUF file is one of {shown(shards)} shards; join them first: llama-gguf-split --merge"
        )
    # A key that we do not know may make it another model: a scale, soft-capping, a misspelled base.
    own = {key: value for key, value in metadata.items() if key.startswith(f"{model_type}.")}
    unknown = [key for key, value in own.items() if key.partition(".")[2] not in _KNOWN and value not in (0, "")]
    unknown = [key for key in unknown if key != f"{model_type}.attention.causal"]
    if unknown:
        raise CheckpointError(
            f"the GGUF file sets {unknown[0][:100]!r}, which is not supported here: the model would be another one"
        )


def _rope(metadata: Mapping[str, Any], model_type: str, head_dim: int, factors: Float32Array | None) -> dict[str, Any]:
    theta = positive_float(metadata, f"{model_type}.rope.freq_base", 1e12, 10_000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    # As llama.cpp: a factor without a type is linear, and a factor of 0 is none.
    factor = metadata.get(f"{model_type}.rope.scaling.factor", metadata.get(f"{model_type}.rope.scale_linear"))
    factor = None if factor == 0 else factor
    scaling = metadata.get(f"{model_type}.rope.scaling.type", "none" if factor is None else "linear")
    if factors is not None:
        if scaling not in ("none", "llama3"):
            raise CheckpointError(f"rope scaling {shown(scaling)} together with rope_freqs.weight is not supported")
        return rope | _factors(theta, head_dim, factors)
    if scaling != "none":
        return rope | {"rope_type": scaling, "factor": factor}
    return rope


def _factors(theta: float, head_dim: int, factors: Float32Array) -> dict[str, Any]:
    """Llama 3's scaling by name where it gives these divisors (other tools can read that), else the divisors."""
    if len(factors) * 2 == head_dim:
        plain, factor = base_frequencies(theta, head_dim), float(factors.max())
        named = llama3_frequencies(plain, factor, 1.0, 4.0, 8192)
        if factor > 1 and np.allclose(plain / factors, named, rtol=1e-5, atol=0):
            return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    return {"rope_type": "gguf_factors", "factors": factors.tolist()}
