"""Qwen3, the dense models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dash_export.models.config import flag, gated_decoder
from dash_export.models.qwen2 import qwen_windows
from dash_export.models.spec import DecoderSpec


def decoder(config: Mapping[str, Any]) -> DecoderSpec:
    """Qwen3ForCausalLM: RMSNorm on each query and key head; heads of 128 by default."""
    bias = flag(config, "attention_bias")
    windows = qwen_windows(config)
    return gated_decoder(
        config,
        max_positions=32_768,
        head_dim=128,
        windows=windows,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )
