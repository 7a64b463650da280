"""Gemma 3 and its text models."""

from dash_export.core.facts import LARGEST
from dash_export.errors import CheckpointError
from dash_export.files.typed_json import shown
from dash_export.models.config import FULL, SLIDING, Config, attention_windows, positive, rotary_embedding, section
from dash_export.models.families.gemma2 import gemma_decoder
from dash_export.models.spec import DecoderSpec


def decoder(config: Config) -> DecoderSpec:
    """Gemma3ForCausalLM: norms on query and key heads; layers with a window have a RoPE base of their own."""
    every = positive(config, "sliding_window_pattern", LARGEST["num_layers"], 6)
    windows = attention_windows(config, lambda layer: (layer + 1) % every != 0, default=4096)
    given = section(config, "rope_parameters")
    local = {"rope_theta": config.get("rope_local_base_freq") or 10_000.0} | section(given, SLIDING)
    full = {"rope_theta": config.get("rope_theta") or 1e6} | section(given, FULL)
    full |= section(config, "rope_scaling")
    kind = full.get("rope_type", full.get("type", "default"))
    if kind not in ("default", "linear"):  # Gemma 3 would scale others in another way; no model uses them
        raise CheckpointError(f"rope type {shown(kind)} is not supported in a Gemma 3; supported: default, linear")
    head_dim = positive(config, "head_dim", LARGEST["head_dim"], 256)
    return gemma_decoder(
        {**config, "rope_scaling": None, "attn_logit_softcapping": None},  # Gemma 3 caps no scores
        windows,
        max_positions=131_072,
        caps=(0.0, 0.0),
        window_rope=True,
        qk_norm=True,
        rope=full,
        window_frequencies=rotary_embedding(config, head_dim, LARGEST["max_positions"], local).frequencies,
    )
