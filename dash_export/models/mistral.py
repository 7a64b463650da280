"""Mistral: Llama; in its first version queries attend to a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dash_export.models.config import SLIDING, attention_windows, gated_decoder, sliding_window
from dash_export.models.spec import DecoderSpec


def decoder(config: Mapping[str, Any]) -> DecoderSpec:
    """MistralForCausalLM: one sliding window for all layers, 4,096 tokens when the config lacks the key."""
    config = {"num_key_value_heads": 8, **config}
    windows = attention_windows(config, sliding_window(config, 4096), lambda _layer: SLIDING)
    return gated_decoder(config, max_positions=131_072, windows=windows)
