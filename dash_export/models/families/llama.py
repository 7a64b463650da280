"""Llama 1 to 3, SmolLM, TinyLlama and everything else whose `model_type` is `llama`."""

from dash_export.models.config import Config, gated_decoder
from dash_export.models.spec import DecoderSpec


def decoder(config: Config) -> DecoderSpec:
    """LlamaForCausalLM: optional biases on all four attention projections and on the MLP."""
    return gated_decoder(config, max_positions=2048, biases=("attention_bias", "mlp_bias"))
