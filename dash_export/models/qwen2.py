"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dash_export.models.decoder import gated_decoder
from dash_export.models.registry import register
from dash_export.models.spec import DecoderSpec


@register("qwen2")
def qwen2(config: Mapping[str, Any]) -> DecoderSpec:
    """Qwen2ForCausalLM: Q, K and V always have a bias, the output projection never. Raises CheckpointError."""
    return gated_decoder(config, max_positions=32_768, qkv_bias=True)
