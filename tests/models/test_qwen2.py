from pathlib import Path

import pytest

from dash_export.models import open_checkpoint
from tests.models.helpers import assert_same_model, edit_config, save_tiny


@pytest.mark.parametrize("tied", [False, True])
def test_equals_transformers(tmp_path: Path, tied: bool) -> None:
    model = save_tiny(tmp_path, "qwen2", tie_word_embeddings=tied, num_hidden_layers=3)
    checkpoint = open_checkpoint(tmp_path)
    assert_same_model(checkpoint, model, tied)
    assert checkpoint.spec.qkv_bias
    assert not checkpoint.spec.output_bias


def test_sliding_window_size_without_its_use_is_accepted(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "qwen2")
    edit_config(
        tmp_path, ("rope_parameters", "layer_types"), rope_theta=10_000.0, sliding_window=131_072, head_dim=None
    )
    assert_same_model(open_checkpoint(tmp_path), model)
