"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dash_export.models.config import gated_decoder
from dash_export.models.spec import DecoderSpec


def decoder(config: Mapping[str, Any]) -> DecoderSpec:
    """Qwen2ForCausalLM: Q, K and V always have a bias, the output projection never."""
    return gated_decoder(config, max_positions=32_768, qkv_bias=True)
