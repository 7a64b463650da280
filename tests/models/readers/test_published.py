"""Folders whose model is one of our families under other names, beside transformers' own model of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dash_export.errors import CheckpointError
from dash_export.models import open_checkpoint
from dash_export.models.config import decoder_spec
from dash_export.models.readers.published import family_config
from dash_export.models.torch_model import torch_model
from tests.models.helpers import DIMENSIONS, edit_config, save_tiny

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
GEMMA_3 = {
    "text_config": DIMENSIONS | {"head_dim": 16, "tie_word_embeddings": True},
    "vision_config": VISION | {"image_size": 28, "patch_size": 14},
    "tie_word_embeddings": True,
}
GRANITE_4 = {"shared_intermediate_size": 96, "intermediate_size": 7, "num_local_experts": 0}
GRANITE_4 |= {"position_embedding_type": "rope", "layer_types": ["full_attention"] * 2, "attention_multiplier": 0.3}
GRANITE_4 |= {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 3.0}


def check(folder: Path, model: Any) -> None:
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        expected, found = (one(ids).logits for one in (model, torch_model(open_checkpoint(folder), torch.float32)))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def renamed(folder: Path, rename: Callable[[str], str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


def test_the_text_half_of_a_gemma_3_that_sees(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "gemma3", scaled=True, kind=transformers.AutoModelForImageTextToText, **GEMMA_3)
    check(tmp_path, model)
    there, other = "language_model.model.", "model.language_model."
    new = any(name.startswith(other) for name in load_file(tmp_path / "model.safetensors"))
    renamed(tmp_path, lambda name: name.replace(other, there) if new else name.replace(there, other))
    check(tmp_path, model)


def test_what_the_first_gemma_3_leaves_out() -> None:
    given = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    spec = decoder_spec(family_config({"model_type": "gemma3", "text_config": given}))
    config = transformers.Gemma3TextConfig()
    assert (spec.vocab_size, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (
        config.vocab_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    )  # fmt: skip


def test_a_dense_granite_4(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "granitemoehybrid", scaled=True, **GRANITE_4)
    check(tmp_path, model)
    edit_config(tmp_path, layer_types=["attention"] * 2)
    check(tmp_path, model)
    for wrong in ({"layer_types": ["mamba", "attention"]}, {"num_local_experts": 8}, {"position_embedding_type": None}):
        edit_config(tmp_path, **({"layer_types": ["attention"] * 2, "num_local_experts": 0, **wrong}))
        with pytest.raises(CheckpointError, match="supported: its dense models"):
            open_checkpoint(tmp_path)
