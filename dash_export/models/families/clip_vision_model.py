"""The image encoder of CLIP."""

from dash_export.models.config import Config, positive
from dash_export.models.encoders import EncoderFamily, Size, encoder_spec, renamed

LAYER = {
    **{own: f"self_attn.{name}_proj" for own, name in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))},
    **{"up": "mlp.fc1", "down": "mlp.fc2", "norm1": "layer_norm1", "norm2": "layer_norm2"},
}
"""Names in a layer of CLIP and SigLIP."""


def encoder(config: Config, size: Size | None = None) -> EncoderFamily:
    """CLIPVisionModel; the projection into the space of texts is left out. Only the pooled vector is normed."""
    config = {"hidden_act": "quick_gelu", **config}
    spec = encoder_spec(
        config,
        size,
        norm_eps=positive(config, "layer_norm_eps", 1.0, 1e-5),
        biased=frozenset({"q", "k", "v", "o", "mlp"}),
        entry_norm=True,
        normed_states=False,
    )
    own = {
        "model.patch": "embeddings.patch_embedding",
        "model.class_token": "embeddings.class_embedding",
        "model.positions": "embeddings.position_embedding.weight",
        "model.entry_norm": "pre_layrnorm",
        "model.norm": "post_layernorm",
    }
    return EncoderFamily(spec, renamed("encoder.layers", LAYER | own), ("", "vision_model."))
