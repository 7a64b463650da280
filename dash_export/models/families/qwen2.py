"""Qwen2 and Qwen2.5."""

from dash_export.core.facts import LARGEST
from dash_export.models.config import Config, attention_windows, gated_decoder, positive
from dash_export.models.spec import DecoderSpec


def decoder(config: Config) -> DecoderSpec:
    """Qwen2ForCausalLM: Q, K and V always have a bias, the output projection never."""
    return gated_decoder(config, max_positions=32_768, windows=qwen_windows(config), qkv_bias=True)


def qwen_windows(config: Config) -> tuple[int, ...]:
    """Return the windows per layer: if `use_sliding_window` is set, layers from `max_window_layers` on have one."""
    all_layers = config.get("max_window_layers") == 0
    first = 0 if all_layers else positive(config, "max_window_layers", LARGEST["num_layers"], 28)
    return attention_windows(config, lambda layer: layer >= first, default=4096, switched=True)
