"""DINOv2."""

from dash_export.core.facts import LARGEST
from dash_export.models.config import MAX_INTERMEDIATE, Config, flag, positive
from dash_export.models.encoders import EncoderFamily, Size, encoder_spec, labels, renamed
from dash_export.models.spec import EncoderSpec

ATTENTION = {
    **{own: f"attention.attention.{name}" for own, name in (("q", "query"), ("k", "key"), ("v", "value"))},
    "o": "attention.output.dense",
}
"""Names of attention's projections in files of DINOv2 and ViT."""
EMBEDDINGS = {
    "model.patch": "embeddings.patch_embeddings.projection",
    "model.class_token": "embeddings.cls_token",
    "model.registers": "embeddings.register_tokens",
    "model.positions": "embeddings.position_embeddings",
    "model.norm": "layernorm",
    "classifier": "classifier",
}


def encoder(config: Config, size: Size | None = None, registers: int = 0) -> EncoderFamily:
    """Dinov2Model and Dinov2ForImageClassification, which reads the class token and the mean of the patches."""
    gated = flag(config, "use_swiglu_ffn")
    inner = int(positive(config, "hidden_size", LARGEST["hidden_size"]) * positive(config, "mlp_ratio", 64.0, 4.0))
    inner = (int(inner * 2 / 3) + 7) // 8 * 8 if gated else inner
    spec = encoder_spec(
        config,
        size,
        intermediate_size=positive({"mlp_ratio": inner}, "mlp_ratio", MAX_INTERMEDIATE),
        norm_eps=positive(config, "layer_norm_eps", 1.0, 1e-6),
        gated=gated,
        biased=frozenset({"o", "mlp", "patch"} | (set("qkv") if flag(config, "qkv_bias", True) else set())),
        layer_scale=True,
        registers=registers,
        antialias=bool(registers),
        labels=labels(config),
        classifies=("class", "mean"),
        **({"activation": "silu"} if gated else {}),
    )
    return EncoderFamily(spec, names(spec), ("", f"{config['model_type']}."))


def names(spec: EncoderSpec):  # type: ignore[no-untyped-def]
    mlp = {"up": "mlp.fc1", "down": "mlp.fc2"}
    if spec.gated:
        mlp = {"gate": "mlp.weights_in#0/2", "up": "mlp.weights_in#1/2", "down": "mlp.weights_out"}
    scales = {f"scale{place}": f"layer_scale{place}.lambda1" for place in "12"}
    norms = {f"norm{place}": f"norm{place}" for place in "12"}
    return renamed("encoder.layer", EMBEDDINGS | ATTENTION | mlp | scales | norms)
