"""Phi-3, Phi-3.5 and Phi-4 mini."""

from dash_export.models.config import Config, attention_windows, gated_decoder
from dash_export.models.spec import DecoderSpec


def decoder(config: Config) -> DecoderSpec:
    """Phi3ForCausalLM: fused projections; Phi-4 mini rotates only a part of each head."""
    config = {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096, **config}
    windows = attention_windows(config, lambda _layer: True)
    return gated_decoder(config, max_positions=4096, windows=windows, partial_rotary=True, fused=True)
