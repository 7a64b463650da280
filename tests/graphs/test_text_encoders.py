"""Text encoders, exported, built and run, against transformers and what sentence-transformers does behind it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from dash_export import DashRuntime
from dash_export.building import build
from dash_export.building.exporting import export
from dash_export.errors import CheckpointError, ContextLengthError, RequestError
from dash_export.models import open_checkpoint, open_model
from dash_export.runtime.encoder import Encoded
from tests.tiny_texts import FIRST, MEAN, TEXTS, save_bert, save_modules

pytestmark = pytest.mark.usefixtures("unmeasured")


def encoded(folder: Path, texts: Any = TEXTS) -> Encoded:
    build(export(folder, folder.parent / "a.dash"), "portable")
    return DashRuntime.load(folder.parent / "a.dash", "portable").encoder()(texts)


def theirs(model: Any, folder: Path, texts: list[str] = TEXTS) -> Any:
    """What transformers gives for a padded batch: [n, tokens, hidden], the mask of the tokens, its pooled vector."""
    batch = AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        found = model(**batch)
    return found.last_hidden_state, batch["attention_mask"][:, :, None].float(), getattr(found, "pooler_output", None)


def test_without_modules_it_is_what_transformers_pools(tmp_path: Path) -> None:
    model = save_bert(tmp_path / "model")
    _, _, pooled = theirs(model, tmp_path / "model")
    found = encoded(tmp_path / "model")
    np.testing.assert_allclose(found.pooled, pooled.numpy(), atol=1e-4)
    assert found.states is None


def test_states(tmp_path: Path) -> None:
    model = save_bert(tmp_path / "model", hidden_act="gelu_pytorch_tanh", type_vocab_size=1)
    states, _, _ = theirs(model, tmp_path / "model", TEXTS[:1])
    found = encoded(tmp_path / "model", TEXTS[0])
    assert found.states is not None
    np.testing.assert_allclose(found.states, states.numpy(), atol=1e-4)


def test_mean_of_all_tokens_of_length_1(tmp_path: Path) -> None:
    model = save_bert(tmp_path / "model")
    save_modules(tmp_path / "model", MEAN, "Normalize")
    states, mask, _ = theirs(model, tmp_path / "model")
    mean = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    np.testing.assert_allclose(encoded(tmp_path / "model").pooled, mean.numpy(), atol=1e-4)


def test_first_token_and_dense_modules(tmp_path: Path) -> None:
    model = save_bert(tmp_path / "model")
    first, second = save_modules(tmp_path / "model", FIRST, sizes=(48, 32))
    states, _, _ = theirs(model, tmp_path / "model")
    expected = torch.tanh(states[:, 0] @ first["linear.weight"].T + first["linear.bias"]) @ second["linear.weight"].T
    np.testing.assert_allclose(encoded(tmp_path / "model").pooled, expected.numpy(), atol=1e-4)


def test_a_model_saved_with_the_head_of_its_training(tmp_path: Path) -> None:
    """It has no pooler: the first token."""
    config = BertConfig(vocab_size=18, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=48, max_position_embeddings=16)  # fmt: skip
    model = save_bert(tmp_path / "model", BertForMaskedLM(config))
    states, _, _ = theirs(model.bert, tmp_path / "model")
    np.testing.assert_allclose(encoded(tmp_path / "model").pooled, states[:, 0].numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"max_position_embeddings": 1 << 20}, "'max_position_embeddings'"),
        ({"vocab_size": 17}, "tokens up to 17"),
        ({"num_attention_heads": 3}, "not a multiple"),
        ({"architectures": ["BertForSequenceClassification"]}, "gives classes"),
    ],
)
def test_wrong_configs(tmp_path: Path, change: dict[str, object], message: str) -> None:
    save_bert(tmp_path)
    with pytest.raises(CheckpointError, match="is an encoder of texts"):
        open_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("pooling", "after", "sizes", "message"),
    [
        ({"pooling_mode_max_tokens": True}, (), (), "pools by"),
        ({"pooling_mode_max_tokens": True, **MEAN}, (), (), "pools by"),
        ({"pooling_mode": "lasttoken"}, (), (), "pools by 'lasttoken'|pools by .'lasttoken'"),
        (MEAN, ("LayerNorm",), (), "a module 'LayerNorm'"),
        (MEAN, ("Normalize", "Dense"), (), "in this order"),
        (MEAN, (), (24,), "gives 24 numbers"),
    ],
)
def test_wrong_modules(
    tmp_path: Path, pooling: dict[str, Any], after: tuple[str, ...], sizes: tuple[int, ...], message: str
) -> None:
    save_bert(tmp_path)
    save_modules(tmp_path, pooling, *after, sizes=sizes)
    with pytest.raises(CheckpointError, match=message):
        open_model(tmp_path)


@pytest.mark.parametrize("path", ["..", "1_Pooling/..", "/etc"])
def test_modules_stay_in_their_folder(tmp_path: Path, path: str) -> None:
    save_bert(tmp_path)
    save_modules(tmp_path, MEAN)
    text = (tmp_path / "modules.json").read_text().replace('"1_Pooling"', json.dumps(path))
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(CheckpointError, match="expected a folder beside it"):
        open_model(tmp_path)


def test_another_pooling_is_another_model(tmp_path: Path) -> None:
    """So that an export is not taken for the one before."""
    save_bert(tmp_path)
    save_modules(tmp_path, MEAN)
    before = open_model(tmp_path)
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(FIRST))
    assert open_model(tmp_path).fingerprint != before.fingerprint
    with pytest.raises(CheckpointError, match="changed while it was read"):
        before.check_same()


def test_texts_that_cannot_be_encoded(tmp_path: Path) -> None:
    save_bert(tmp_path / "model")
    build(export(tmp_path / "model", tmp_path / "a.dash"), "portable")
    encoder = DashRuntime.load(tmp_path / "a.dash", "portable").encoder()
    for texts, message in (
        ([], "no texts"),
        ([""], "is empty"),
        ([b"a"], "must be a str"),
        (["a", 3], "must be a str"),
    ):
        with pytest.raises(RequestError, match=message):
            encoder(texts)
    assert len(encoder("a " * 14)) == 1
    with pytest.raises(ContextLengthError, match="has 17 tokens, and 16 are the most"):
        encoder("a " * 15)
    for ids in (np.array([[18]]), np.array([[-1]]), np.zeros((1, 17), int), np.zeros((0, 3), int), np.zeros((1, 3))):
        with pytest.raises(RequestError, match="token ids below 18"):
            encoder.encode(ids)
