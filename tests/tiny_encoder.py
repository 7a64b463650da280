"""Tiny random image encoders, and the bundles made of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from dash_export.building import build
from dash_export.building.exporting import export
from dash_export.core.policy import SkipPolicy, untrained_policy
from dash_export.core.units import Unit
from dash_export.models import EncoderCheckpoint, open_model

SIDE, PATCH = 42, 14
UNITS = (Unit(1, 1), Unit(2, 2), Unit(3, 4))
"""Of five layers."""
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dinov2": ("Dinov2", "Dinov2Model", {}),
    "dinov2-swiglu-classes": ("Dinov2", "Dinov2ForImageClassification", {"use_swiglu_ffn": True, "num_labels": 5}),
    "dinov2-registers-classes": (
        "Dinov2WithRegisters",
        "Dinov2WithRegistersForImageClassification",
        {"num_labels": 3, "qkv_bias": False},
    ),
    "vit-classes": ("ViT", "ViTForImageClassification", {"num_labels": 3}),
    "clip": ("CLIPVision", "CLIPVisionModel", {}),
    "clip-projection": ("CLIPVision", "CLIPVisionModelWithProjection", {"hidden_act": "gelu"}),
    "siglip": ("SiglipVision", "SiglipVisionModel", {}),
    "dinov3": ("DINOv3ViT", "DINOv3ViTModel", {"num_register_tokens": 2}),
    "dinov3-gated": ("DINOv3ViT", "DINOv3ViTModel", {"use_gated_mlp": True, "hidden_act": "silu", "key_bias": True}),
}
"""Name -> its config's class, its model's class, options."""


def save_encoder(folder: Path, name: str = "dinov2", side: int = SIDE, **options: Any) -> Any:
    """A random encoder of five layers, whose pictures are prepared to `side` pixels. Returns the transformers model."""
    config, model, own = MODELS[name]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 48}
    given = {**sizes, "image_size": SIDE, "patch_size": PATCH, **own, **options}
    made = getattr(transformers, model)(getattr(transformers, f"{config}Config")(**given)).eval()
    for parameter in made.parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.5)
    made.save_pretrained(folder)
    prepared = {"image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
    return made


def encoder_policy(checkpoint: EncoderCheckpoint, units: tuple[Unit, ...] = UNITS, seed: int = 0) -> SkipPolicy:
    """A random policy that decides differently about random pictures, with bypasses that show."""
    rng, spec = np.random.default_rng(seed), checkpoint.spec
    policy = untrained_policy(spec, units, seed)
    bypasses = tuple(
        {
            name: (0.2 * rng.standard_normal(shape)).astype(np.float16).astype(np.float32)
            for name, shape in shapes.items()
        }
        for shapes in map(spec.bypass_shapes, units)
    )
    return SkipPolicy(units, units[0].first - 1, policy.network, bypasses, "random", tuple(range(len(units)))[::-1])


def encoder_bundle(root: Path, name: str = "dinov2", target: str = "portable", **options: Any) -> Path:
    """Export a tiny encoder under `root` and build it. Returns the bundle."""
    save_encoder(root / "model", name, **options)
    checkpoint = open_model(root / "model")
    assert isinstance(checkpoint, EncoderCheckpoint)
    bundle = export(checkpoint, root / "tiny.dash", encoder_policy(checkpoint))
    build(bundle, target)
    return bundle.root


def random_pixels(count: int, side: int = SIDE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, side, side)).astype(np.float32)
