from pathlib import Path
from typing import Any

import pytest

from dash_export.models import open_checkpoint
from tests.models.helpers import assert_same_model, edit_config, save_tiny


@pytest.mark.parametrize(
    "options", [{"head_dim": 16}, {"head_dim": 32, "attention_bias": True}, {"tie_word_embeddings": True}]
)
def test_equals_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    model = save_tiny(tmp_path, "qwen3", **options)
    checkpoint = open_checkpoint(tmp_path)
    assert_same_model(checkpoint, model, "tie_word_embeddings" in options)
    assert checkpoint.spec.qk_norm
    assert checkpoint.spec.head_dim == options.get("head_dim", 128)


def test_head_dim_left_out_is_128(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "qwen3")
    edit_config(tmp_path, ("head_dim",))
    assert_same_model(open_checkpoint(tmp_path), model)
