"""ViT."""

from dash_export.models.config import Config, flag, positive
from dash_export.models.encoders import EncoderFamily, Size, encoder_spec, labels, renamed
from dash_export.models.families.dinov2 import ATTENTION, EMBEDDINGS


def encoder(config: Config, size: Size | None = None) -> EncoderFamily:
    """ViTModel, without the dense layer of its pooler, and ViTForImageClassification."""
    spec = encoder_spec(
        config,
        size,
        norm_eps=positive(config, "layer_norm_eps", 1.0, 1e-12),
        biased=frozenset({"o", "mlp", "patch"} | (set("qkv") if flag(config, "qkv_bias", True) else set())),
        labels=labels(config),
    )
    own = {"up": "intermediate.dense", "down": "output.dense", "norm1": "layernorm_before", "norm2": "layernorm_after"}
    return EncoderFamily(spec, renamed("encoder.layer", EMBEDDINGS | ATTENTION | own), ("", "vit."))
