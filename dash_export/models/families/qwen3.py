"""Qwen3, the dense models."""

from dash_export.models.config import Config, gated_decoder
from dash_export.models.families.qwen2 import qwen_windows
from dash_export.models.spec import DecoderSpec


def decoder(config: Config) -> DecoderSpec:
    """Qwen3ForCausalLM: RMSNorm on each query and key head; heads of 128 by default."""
    windows, biases = qwen_windows(config), ("attention_bias",)
    return gated_decoder(config, max_positions=32_768, head_dim=128, windows=windows, biases=biases, qk_norm=True)
