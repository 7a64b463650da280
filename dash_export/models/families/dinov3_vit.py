"""DINOv3: registers, rotary positions of the patches, a plain or a gated MLP."""

from dash_export.models.config import Config, flag, positive
from dash_export.models.encoders import EncoderFamily, Size, encoder_spec, renamed


def encoder(config: Config, size: Size | None = None) -> EncoderFamily:
    """DINOv3ViTModel."""
    defaults = {"q": ("query", True), "k": ("key", False), "v": ("value", True), "o": ("proj", True)}
    biases = {own for own, (name, default) in defaults.items() if flag(config, f"{name}_bias", default)}
    gated = flag(config, "use_gated_mlp")
    spec = encoder_spec(
        config,
        size,
        norm_eps=positive(config, "layer_norm_eps", 1.0, 1e-5),
        gated=gated,
        biased=frozenset(biases | {"patch"} | ({"mlp"} if flag(config, "mlp_bias", True) else set())),
        layer_scale=True,
        registers=(config.get("num_register_tokens") and positive(config, "num_register_tokens", 64)) or 0,
        table_size=(),
        rope_theta=positive(config, "rope_theta", 1e6, 100.0),
    )
    own = {
        **{name: f"attention.{name}_proj" for name in "qkvo"},
        **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
        **{f"scale{place}": f"layer_scale{place}.lambda1" for place in "12"},
        **{f"norm{place}": f"norm{place}" for place in "12"},
        "model.patch": "embeddings.patch_embeddings",
        "model.class_token": "embeddings.cls_token",
        "model.registers": "embeddings.register_tokens",
        "model.norm": "norm",
    }
    return EncoderFamily(spec, renamed("layer", own), ("", "model."))
