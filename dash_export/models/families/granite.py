"""Granite 3: Llama with four multipliers."""

from dash_export.core.facts import Traits
from dash_export.models.config import MAX_FACTOR, Config, gated_decoder, positive
from dash_export.models.spec import DecoderSpec


def decoder(config: Config) -> DecoderSpec:
    """GraniteForCausalLM: scores are multiplied by `attention_multiplier` instead of head_dim ** -0.5."""
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    embedding, residual, attention, logits = (positive(config, name, MAX_FACTOR, 1.0) for name in names)
    traits = Traits(
        embedding_scale=embedding, residual_scale=residual, attention_scale=attention, logits_scale=1 / logits
    )
    return gated_decoder(config, max_positions=2048, traits=traits, biases=("attention_bias", "mlp_bias"))
