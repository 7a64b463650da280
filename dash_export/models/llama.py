"""Llama 1 to 3, SmolLM, TinyLlama and everything else whose `model_type` is `llama`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dash_export.models.config import flag, gated_decoder
from dash_export.models.spec import DecoderSpec


def decoder(config: Mapping[str, Any]) -> DecoderSpec:
    """LlamaForCausalLM: optional biases on all four attention projections and on the MLP."""
    bias = flag(config, "attention_bias")
    return gated_decoder(config, max_positions=2048, qkv_bias=bias, output_bias=bias, mlp_bias=flag(config, "mlp_bias"))
