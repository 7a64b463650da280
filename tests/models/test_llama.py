from pathlib import Path
from typing import Any

import pytest

from dash_export.errors import CheckpointError
from dash_export.models import open_checkpoint
from dash_export.models.registry import decoder_spec
from tests.models.helpers import DIMENSIONS, assert_same_model, edit_config, save_tiny

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIG: dict[str, Any] = {"model_type": "llama", **DIMENSIONS}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 32, "num_hidden_layers": 3, "rms_norm_eps": 1e-5},
        {"num_key_value_heads": 4},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ],
)
def test_equals_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    model = save_tiny(tmp_path, "llama", **options)
    checkpoint = open_checkpoint(tmp_path)
    tied = bool(options.get("tie_word_embeddings"))
    assert_same_model(checkpoint, model, tied)
    spec = checkpoint.spec
    assert (spec.tie_embeddings, spec.qkv_bias, spec.mlp_bias) == (tied, "mlp_bias" in options, "mlp_bias" in options)
    assert spec.rope.scaling == {"llama3": "llama3", "linear": "linear"}.get(
        options.get("rope_parameters", {}).get("rope_type"), "none"
    )


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("kind", ["llama3", "linear"])
def test_older_rope_spelling(tmp_path: Path, key: str, kind: str) -> None:
    model = save_tiny(tmp_path, "llama", rope_parameters=LLAMA3 | {"rope_type": kind})
    scaling = {name: value for name, value in LLAMA3.items() if name not in ("rope_type", "rope_theta")}
    edit_config(tmp_path, ("rope_parameters",), rope_theta=500_000, rope_scaling={key: kind, **scaling})
    assert_same_model(open_checkpoint(tmp_path), model)


def test_defaults_are_those_of_transformers() -> None:
    needed = {key: value for key, value in CONFIG.items() if key.endswith("_size") or key == "model_type"}
    spec = decoder_spec({**needed, "num_hidden_layers": 2, "num_attention_heads": 4})
    assert (spec.num_kv_heads, spec.head_dim, spec.max_positions, spec.rms_norm_eps) == (4, 16, 2048, 1e-6)
    assert (spec.rope.theta, spec.tie_embeddings) == (10_000.0, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn.*supported: default, linear, llama3"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, "rope type"),
        ({"rope_parameters": "linear"}, "rope_parameters"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layer type"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": True}}, "factor"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta"),
        ({"rope_theta": 1e-300}, "not finite"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act.*silu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": 3}, "layer_types"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 10**5000}, "hidden_size.*huge"),
        ({"hidden_size": 66}, "multiple"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ],
)
def test_unsupported_or_invalid_options_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        decoder_spec(CONFIG | change)
