"""The image encoder of SigLIP: no class token; a learned probe attends to the patches for the pooled vector."""

from dash_export.errors import CheckpointError
from dash_export.models.config import Config, flag, positive
from dash_export.models.encoders import EncoderFamily, Size, encoder_spec, renamed
from dash_export.models.families.clip_vision_model import LAYER


def encoder(config: Config, size: Size | None = None) -> EncoderFamily:
    """SiglipVisionModel."""
    if not flag(config, "vision_use_head", True):
        raise CheckpointError("vision_use_head false is not supported: without its head the encoder pools nothing")
    config = {"hidden_act": "gelu_pytorch_tanh", **config}
    eps = positive(config, "layer_norm_eps", 1.0, 1e-6)
    spec = encoder_spec(config, size, norm_eps=eps, class_token=False, pooling="probe")
    parts = {f"pool.{own}": f"head.attention.in_proj_#{place}/3" for place, own in enumerate("qkv")}
    own = {
        "model.patch": "embeddings.patch_embedding",
        "model.positions": "embeddings.position_embedding.weight",
        "model.norm": "post_layernorm",
        "pool.probe": "head.probe",
        "pool.o": "head.attention.out_proj",
        "pool.norm": "head.layernorm",
        "pool.up": "head.mlp.fc1",
        "pool.down": "head.mlp.fc2",
    }
    return EncoderFamily(spec, renamed("encoder.layers", LAYER | own | parts), ("", "vision_model."))
