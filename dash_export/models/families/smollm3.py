"""SmolLM3: Llama without rotary embedding in every fourth layer."""

from dash_export.core.facts import LARGEST, Traits
from dash_export.errors import CheckpointError
from dash_export.models.config import Config, attention_windows, gated_decoder, positive
from dash_export.models.spec import DecoderSpec


def decoder(config: Config) -> DecoderSpec:
    """SmolLM3ForCausalLM: `no_rope_layers` has a 0 for each layer without rotary embedding."""
    config = {"num_key_value_heads": 4, "rope_theta": 2e6, **config}
    layers = positive(config, "num_hidden_layers", LARGEST["num_layers"])
    interval = positive(config, "no_rope_layer_interval", LARGEST["num_layers"], 4)
    turns = config.get("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in range(layers)]
    if not isinstance(turns, list) or len(turns) != layers or any(one not in (0, 1) for one in turns):
        raise CheckpointError(f"config 'no_rope_layers' must have a 0 or a 1 for each of {layers} layers")
    unrotated = tuple(layer for layer, turned in enumerate(turns) if not turned)
    windows = attention_windows(config, lambda layer: layer in unrotated, switched=True)
    return gated_decoder(
        config,
        max_positions=32_768,
        windows=windows,
        traits=Traits(unrotated=unrotated),
        biases=("attention_bias", "mlp_bias"),
        tied=True,
    )
