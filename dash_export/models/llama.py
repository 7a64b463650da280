"""Llama 1 to 3, SmolLM, TinyLlama and everything else whose `model_type` is `llama`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dash_export.models.decoder import gated_decoder
from dash_export.models.fields import flag
from dash_export.models.registry import register
from dash_export.models.spec import DecoderSpec


@register("llama")
def llama(config: Mapping[str, Any]) -> DecoderSpec:
    """LlamaForCausalLM: optional biases on all four attention projections and on the MLP. Raises CheckpointError."""
    attention_bias = flag(config, "attention_bias")
    return gated_decoder(
        config,
        max_positions=2048,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=flag(config, "mlp_bias"),
    )
