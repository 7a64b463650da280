"""OLMo 2."""

from dash_export.core.facts import Traits
from dash_export.models.config import Config, gated_decoder
from dash_export.models.spec import DecoderSpec


def decoder(config: Config) -> DecoderSpec:
    """Olmo2ForCausalLM: norms after attention and MLP instead of before; Q and K are normed over all heads at once."""
    return gated_decoder(
        {"rms_norm_eps": 1e-5, **config},
        max_positions=2048,
        traits=Traits(norms_after=True),
        biases=("attention_bias",),
        qk_norm=True,
        post_norms=True,
    )
