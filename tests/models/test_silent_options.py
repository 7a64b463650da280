"""An option that would make it another model is refused or followed, never ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dash_export.errors import CheckpointError
from dash_export.models import open_checkpoint
from tests.models.helpers import write_gguf
from tests.tiny import save_model

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0}


def edited(folder: Path, **options: Any) -> Path:
    """A tiny model folder, its config changed."""
    if not folder.exists():
        save_model(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    return folder


def test_a_second_head_beside_a_tied_embedding(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds another lm_head"):
        open_checkpoint(edited(tmp_path / "model", tie_word_embeddings=True))


def test_the_same_head_twice_is_one(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    model.save_pretrained(tmp_path / "model")
    assert open_checkpoint(edited(tmp_path / "model", tie_word_embeddings=True)).spec.tie_embeddings


def test_no_causal_mask(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is_causal"):
        open_checkpoint(edited(tmp_path / "model", is_causal=False))


def test_the_original_context_of_the_config_wins(tmp_path: Path) -> None:
    """As in transformers, over that of the scaling."""
    inner = LLAMA3 | {"original_max_position_embeddings": 8192}
    outer = edited(tmp_path / "outer", original_max_position_embeddings=64, rope_parameters=inner)
    alone = edited(tmp_path / "alone", rope_parameters=LLAMA3 | {"original_max_position_embeddings": 64})
    other = edited(tmp_path / "other", rope_parameters=inner)
    found = [open_checkpoint(folder).spec.rope_frequencies for folder in (outer, alone, other)]
    assert found[0] == found[1] != found[2]


def test_a_tokenizer_of_a_larger_model(tmp_path: Path) -> None:
    save_model(tmp_path / "model", vocab_size=200)
    with pytest.raises(CheckpointError, match="the embedding has 200 rows"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"llama.rope.freq_bast": 500000.0}, "freq_bast"),
        ({"llama.attn_logit_softcapping": 50.0}, "softcapping"),
        ({"llama.attention.causal": False}, "causal"),
        ({"llama.rope.scaling.attn_factor": 1.2}, "attn_factor"),
        ({"general.type": "adapter"}, "adapter"),
        ({"split.count": "two"}, "shards"),
        ({"tokenizer.ggml.token_type": [7] * 259}, "1 to 6"),
    ],
)
def test_gguf_metadata_of_another_model(metadata: dict[str, Any], match: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", save_model(tmp_path / "model"), metadata=metadata)
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("metadata", "divisor"),
    [
        ({"llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scale_linear": 4.0}, 4.0),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scaling.factor": 0.0}, 1.0),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, 1.0),
        ({"llama.attention.causal": True, "llama.pooling_type": 0}, 1.0),
    ],
)
def test_gguf_scaling_as_llama_cpp_reads_it(metadata: dict[str, Any], divisor: float, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    write_gguf(tmp_path / "plain.gguf", model)
    write_gguf(tmp_path / "scaled.gguf", model, metadata=metadata)
    plain, scaled = (open_checkpoint(tmp_path / f"{name}.gguf").spec.rope_frequencies for name in ("plain", "scaled"))
    np.testing.assert_allclose(np.array(plain) / divisor, scaled, rtol=1e-6)
