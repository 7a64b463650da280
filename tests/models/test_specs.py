"""Configs of every family, in the forms that transformers writes and wrote, and what is wrong with one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from dash_export.errors import CheckpointError
from dash_export.models import open_checkpoint
from dash_export.models.config import FAMILIES, decoder_spec
from tests.models.helpers import DIMENSIONS, assert_same_model, edit_config, save_tiny
from tests.tiny import LLAMA3

CONFIG: dict[str, Any] = {"model_type": "llama", **DIMENSIONS}


OLDER = {name: value for name, value in LLAMA3.items() if name not in ("rope_type", "rope_theta")}


@pytest.mark.parametrize(
    ("family", "options", "removed", "written"),
    [
        *(
            (
                "llama",
                {"rope_parameters": LLAMA3 | {"rope_type": kind}},
                ("rope_parameters",),
                {"rope_theta": 500_000, "rope_scaling": {key: kind, **OLDER}},
            )
            for key in ("type", "rope_type")
            for kind in ("llama3", "linear")
        ),
        (
            "qwen2",
            {},
            ("rope_parameters", "layer_types"),
            {"rope_theta": 10_000.0, "sliding_window": 131_072, "head_dim": None},
        ),
        ("qwen3", {}, ("head_dim",), {}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, (), {}),
    ],
    ids=["type llama3", "type linear", "llama3", "linear", "a window not in use", "no head_dim", "dynamic"],
)
def test_older_spellings(
    tmp_path: Path, family: str, options: dict[str, Any], removed: tuple[str, ...], written: dict[str, Any]
) -> None:
    """And a scaling that the context does not need. Every family and option in its usual form: graphs/test_families."""
    model = save_tiny(tmp_path, family, **options)
    edit_config(tmp_path, removed, **written)
    assert_same_model(open_checkpoint(tmp_path), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_as_in_transformers(family: str) -> None:
    given = {"vocab_size": 300, "hidden_size": 1024, "intermediate_size": 96, "num_hidden_layers": 8}
    given |= {"num_attention_heads": 32}
    spec, config = decoder_spec({"model_type": family, **given}), AutoConfig.for_model(family, **given)
    assert spec.num_kv_heads == config.num_key_value_heads
    assert spec.head_dim == (getattr(config, "head_dim", None) or 32)
    assert (spec.rms_norm_eps, spec.max_positions) == (config.rms_norm_eps, config.max_position_embeddings)
    assert spec.tie_embeddings == config.tie_word_embeddings
    ropes = config.rope_parameters if "rope_theta" not in config.rope_parameters else {"": config.rope_parameters}
    for kind, rope in ropes.items():
        found = spec.window_frequencies if kind == "sliding_attention" else spec.rope_frequencies
        exponents = np.arange(0, spec.head_dim, 2) / spec.head_dim
        np.testing.assert_allclose(found, rope["rope_theta"] ** -exponents, rtol=1e-5)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * 8
    window = getattr(config, "sliding_window", None)
    windows = [window or 0 if kind == "sliding_attention" else 0 for kind in kinds]
    assert spec.traits.windows == (tuple(windows) if any(windows) else ())
    assert spec.traits.score_cap == (getattr(config, "attn_logit_softcapping", None) or 0)
    assert spec.traits.logits_cap == (getattr(config, "final_logit_softcapping", None) or 0)
    assert spec.traits.unrotated == tuple(place for place in (3, 7) if family == "smollm3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "ntk.*supported: default, linear, llama3, yarn"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, "rope type"),
        ({"rope_parameters": "linear"}, "rope_parameters"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layer type"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": True}}, "factor"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta"),
        ({"rope_theta": 1e-300}, "rope_theta"),
        ({"max_position_embeddings": 1 << 20, "head_dim": 1024}, "RoPE tables for 1048576 positions take 4096 MB"),
        (
            {"model_type": "gemma3_text", "max_position_embeddings": 1 << 19, "head_dim": 512},
            "RoPE tables for 524288 positions take 2048 MB",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 5e-324}}, "beta_fast"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act.*silu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": None}, "there is none"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "for each of 2 layers"),
        ({"model_type": "gemma2", "layer_types": ["chunked_attention"] * 2}, "for each of 2 layers"),
        ({"model_type": "gemma2", "hidden_act": "silu"}, "hidden_act.*gelu_pytorch_tanh"),
        ({"model_type": "gemma2", "attn_logit_softcapping": -1.0}, "attn_logit_softcapping"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "causal"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "this is an embedding model"),
        ({"model_type": "gemma3_text", "rope_parameters": [1]}, "rope_parameters"),
        ({"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": 1}}, "sliding_attention"),
        (
            {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "'yarn' is not supported in a Gemma 3",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers"),
        ({"model_type": "granite", "residual_multiplier": 0}, "residual_multiplier"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.01}, "turns 0 dimensions"),
        ({"model_type": "phi3", "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "short_factor"),
        ({"model_type": "phi3", "rope_parameters": {"rope_type": "longrope", "short_factor": ["x"] * 8}}, "short_fac"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}}, "rope_theta"),
        ({"is_causal": False}, "is_causal"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"hidden_size": 10**5000}, "hidden_size.*huge"),
        ({"hidden_size": 66}, "multiple"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"max_position_embeddings": 1}, "max_position_embeddings"),
        ({"max_position_embeddings": (1 << 24) + 1}, "max_position_embeddings"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"attention_bias": "yes"}, "attention_bias"),
    ],
)
def test_unsupported_or_invalid_options_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        decoder_spec(CONFIG | change)


def test_a_window_of_the_whole_context_is_none() -> None:
    windows = [
        decoder_spec(CONFIG | {"model_type": "mistral", "sliding_window": size}).traits.windows for size in (511, 512)
    ]
    assert windows == [(511, 511), ()]


@pytest.mark.parametrize("model_type", ["gpt2", "x" * 10_000, None, 3, ["llama"], {}])
def test_unknown_families(model_type: object) -> None:
    with pytest.raises(CheckpointError, match="not supported; supported: llama, qwen2, qwen3") as raised:
        decoder_spec({"model_type": model_type})
    assert len(str(raised.value)) < 300


FACTORS = {"short_factor": [1.0 + pair for pair in range(8)], "long_factor": [2.0] * 8}
PHI = CONFIG | {"model_type": "phi3", "rope_scaling": {"type": "longrope"} | FACTORS}
GEMMA = CONFIG | {"model_type": "gemma3_text", "rope_local_base_freq": 5000.0}
ROPES = {each: {"rope_type": "default"} for each in ("full_attention", "sliding_attention")}
QWEN = CONFIG | {"model_type": "qwen2", "sliding_window": 9, "max_window_layers": 0}
SCALED = CONFIG | {"rope_parameters": LLAMA3}
EARLIER = {"original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("config", "other", "another"),
    [
        *((PHI, {"rope_scaling": {"type": kind} | FACTORS}, {"rope_scaling": None}) for kind in ("su", "yarn")),
        (GEMMA, {"rope_parameters": ROPES}, {"rope_local_base_freq": 6000.0}),
        (SCALED | EARLIER, {"rope_parameters": LLAMA3 | EARLIER}, {"original_max_position_embeddings": None}),
        (QWEN, {"sliding_window": 5}, {"use_sliding_window": True}),
    ],
    ids=["older name", "oldest name", "bases beside the scaling", "the config's original context", "an unused window"],
)
def test_two_configs_of_one_model(config: dict[str, Any], other: dict[str, Any], another: dict[str, Any]) -> None:
    assert decoder_spec(config) == decoder_spec(config | other) != decoder_spec(config | another)


def test_windows_of_qwen2_begin_at_a_layer() -> None:
    used = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    spec = decoder_spec(CONFIG | used)
    kinds = AutoConfig.for_model(**CONFIG | used).layer_types
    assert spec.traits.windows == tuple(9 if kind == "sliding_attention" else 0 for kind in kinds)
    assert kinds == ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(("written", "context"), [(32_768, 131_072), (131_072, 131_072), (262_144, 262_144)])
def test_yarn_lengthens_the_context(written: int, context: int) -> None:
    """Cards say to add the scaling and nothing else, and some models have the context that follows in their config."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
    spec = decoder_spec(CONFIG | {"rope_scaling": yarn, "max_position_embeddings": written})
    assert spec.max_positions == context


def test_the_facts_of_a_runtime_are_counted_and_named() -> None:
    spec = decoder_spec(CONFIG, "a \x1b[31mred\u202e one")
    assert spec.name == "a [31mred one"
    # embedding and head, and in each of two layers Q, O, K, V, the MLP and the norms
    assert spec.parameters == 2 * 300 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64) + 64
