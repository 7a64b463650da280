"""DINOv2 with registers: tokens that belong to no patch, between the class token and the patches."""

from dash_export.models.config import Config, positive
from dash_export.models.encoders import EncoderFamily, Size
from dash_export.models.families import dinov2


def encoder(config: Config, size: Size | None = None) -> EncoderFamily:
    return dinov2.encoder(config, size, positive(config, "num_register_tokens", 64, 4))
