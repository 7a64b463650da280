"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dash_export.manifest import LARGEST
from dash_export.models.config import FULL, SLIDING, attention_windows, flag, gated_decoder, positive, sliding_window
from dash_export.models.spec import DecoderSpec


def decoder(config: Mapping[str, Any]) -> DecoderSpec:
    """Qwen2ForCausalLM: Q, K and V always have a bias, the output projection never."""
    return gated_decoder(config, max_positions=32_768, windows=qwen_windows(config), qkv_bias=True)


def qwen_windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the windows per layer: if `use_sliding_window` is set, layers from `max_window_layers` on have one."""
    window = sliding_window(config, 4096) if flag(config, "use_sliding_window") else None
    all_layers = config.get("max_window_layers") == 0
    first = 0 if all_layers else positive(config, "max_window_layers", LARGEST["num_layers"], 28)
    return attention_windows(config, window, lambda layer: SLIDING if layer >= first else FULL)
