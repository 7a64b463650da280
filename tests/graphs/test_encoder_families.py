"""Every family of image encoders, exported, built and run, against transformers itself."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dash_export import DashRuntime
from dash_export.building import build
from dash_export.building.exporting import export
from dash_export.errors import CheckpointError
from dash_export.models import open_checkpoint, open_model
from tests.tiny_encoder import MODELS, PATCH, SIDE, random_pixels, save_encoder

pytestmark = pytest.mark.usefixtures("unmeasured")


LARGER, SMALLER = SIDE + 2 * PATCH, SIDE - PATCH
CASES = [
    *((name, SIDE) for name in MODELS),
    *((name, LARGER) for name in ("dinov2-registers-classes", "vit-classes", "clip", "siglip", "dinov3")),
    *((name, SMALLER) for name in ("dinov2", "dinov2-registers-classes", "dinov3-gated")),
]


@pytest.mark.parametrize(("name", "side"), CASES)
def test_equals_transformers(tmp_path: Path, name: str, side: int) -> None:
    """At the size the model was made for, and at others, for which its positions are interpolated."""
    theirs = save_encoder(tmp_path / "model", name, side)
    build(export(tmp_path / "model", tmp_path / "a.dash"), "portable")
    pixels = random_pixels(2, side)
    found = DashRuntime.load(tmp_path / "a.dash", "portable").encoder().encode(pixels)
    by_itself = name.startswith("dino")  # others ask to be told that a picture has another size
    options = {} if by_itself else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = theirs(torch.from_numpy(pixels), **options)
    compared = 0
    for mine, name_there in ((found.pooled, "pooler_output"), (found.states, "last_hidden_state")):
        if (one := getattr(expected, name_there, None)) is not None:
            np.testing.assert_allclose(mine, one.numpy(), atol=1e-4)
            compared += 1
    if (logits := getattr(expected, "logits", None)) is not None:
        assert found.probabilities is not None
        np.testing.assert_allclose(found.probabilities, logits.softmax(-1).numpy(), atol=1e-5)
        compared += 1
    assert compared


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"num_channels": 1}, "num_channels 1 is not supported"),
        ({"patch_size": 13}, "not whole patches of 13"),
        ({"num_attention_heads": 3}, "not a multiple of num_attention_heads 3"),
        ({"hidden_size": "32"}, "'hidden_size'"),
        ({"mlp_ratio": 3}, "the config asks for"),
        ({"model_type": "swin"}, "model_type 'swin' is not supported"),
    ],
)
def test_wrong_configs(tmp_path: Path, change: dict[str, object], message: str) -> None:
    save_encoder(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        open_model(tmp_path)


def test_what_is_missing(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    with pytest.raises(CheckpointError, match="is an encoder of pictures"):
        open_checkpoint(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="has no preprocessor_config"):
        open_model(tmp_path)
