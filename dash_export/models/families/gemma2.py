"""Gemma 2."""

from typing import Any

from dash_export.core.facts import Traits
from dash_export.models.config import MAX_FACTOR, Config, attention_windows, gated_decoder, positive
from dash_export.models.spec import DecoderSpec


def decoder(config: Config) -> DecoderSpec:
    """Gemma2ForCausalLM: every other layer has a window; scores and logits are capped."""
    windows = attention_windows(config, lambda layer: layer % 2 == 0, default=4096)
    return gemma_decoder(config, windows, max_positions=8192, caps=(50.0, 30.0))


def gemma_decoder(
    config: Config,
    windows: tuple[int, ...],
    *,
    max_positions: int,
    caps: tuple[float, float],
    window_rope: bool = False,
    **fields: Any,
) -> DecoderSpec:
    """Return a Gemma's spec. `caps`: default caps of (scores, logits) for keys that the config lacks (0: no cap)."""
    config = {"num_key_value_heads": 4, **config}
    names = ("attn_logit_softcapping", "final_logit_softcapping")
    scores, logits = (
        positive(config, name, MAX_FACTOR) if config.get(name) else 0.0 if name in config else default
        for name, default in zip(names, caps, strict=True)
    )
    traits = Traits(
        activation="gelu_tanh",
        window_rope=window_rope,
        embedding_scale=positive(config, "hidden_size", MAX_FACTOR) ** 0.5,
        attention_scale=positive(config, "query_pre_attn_scalar", MAX_FACTOR, 256.0) ** -0.5,
        score_cap=scores,
        logits_cap=logits,
    )
    return gated_decoder(
        config,
        max_positions=max_positions,
        head_dim=256,
        windows=windows,
        traits=traits,
        biases=("attention_bias",),
        tied=True,
        post_norms=True,
        norm_offset=1.0,
        **fields,
    )
