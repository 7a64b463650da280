"""Mistral: Llama; in its first version queries attend to a sliding window."""

from dash_export.models.config import Config, attention_windows, gated_decoder
from dash_export.models.spec import DecoderSpec


def decoder(config: Config) -> DecoderSpec:
    """MistralForCausalLM: one sliding window for all layers, 4,096 tokens when the config lacks the key."""
    config = {"num_key_value_heads": 8, **config}
    windows = attention_windows(config, lambda _layer: True, default=4096)
    return gated_decoder(config, max_positions=131_072, windows=windows)
