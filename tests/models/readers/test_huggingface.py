import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from dash_export.bundle.layout import TEXT_FILES
from dash_export.errors import CheckpointError
from dash_export.models import open_checkpoint
from dash_export.text.tokenizer import Text
from tests.commands.helpers import python
from tests.models.helpers import (
    SAFETENSORS_LAYOUTS,
    assert_same_model,
    assert_same_weights,
    edit_config,
    save_tiny,
    tiny_tokenizer,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, save_tiny(folder, "llama")


@pytest.fixture
def folder(saved: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "model"))


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace (or with None remove) tensors of model.safetensors; `__` in a keyword stands for a dot."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_sharded(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama", max_shard_size="60KB")
    first, second, *others = sorted(tmp_path.glob("*.safetensors"))
    assert others
    assert_same_model(open_checkpoint(tmp_path), model)
    save_file(load_file(second) | load_file(first), second)
    refused(tmp_path, f"{second.name} is not.* is in another file")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "model.safetensors"
    state = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(state, path)
    assert_same_weights(open_checkpoint(folder), state)


def test_base_model_names_without_prefix(folder: Path, saved: tuple[Path, Any]) -> None:
    path = folder / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}, path)
    assert_same_model(open_checkpoint(folder), saved[1])


def test_buffers_and_surplus_layers_are_ignored(folder: Path, saved: tuple[Path, Any]) -> None:
    rewrite(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
    rewrite(folder, model__layers__2__self_attn__q_proj__bias=torch.ones(64))
    assert_same_model(open_checkpoint(folder), saved[1])


def test_assets(folder: Path) -> None:
    """A template of its own file wins over that of the config, of which one may be a list of named ones."""
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    for template, found in (("one", "one"), (named, "yes")):
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assets = open_checkpoint(folder).assets
        assert assets["chat_template.jinja"] == found
    assert assets["config.json"] == (folder / "config.json").read_text()
    assert set(assets) == set(TEXT_FILES)
    (folder / "chat_template.jinja").write_text("of the file")
    assert open_checkpoint(folder).assets["chat_template.jinja"] == "of the file"


def test_fingerprint_follows_content_not_place(folder: Path, saved: tuple[Path, Any]) -> None:
    first = open_checkpoint(folder).fingerprint
    assert first == open_checkpoint(str(saved[0])).fingerprint
    rewrite(folder, model__norm__weight=torch.ones(64))
    second = open_checkpoint(folder).fingerprint
    edit_config(folder, rms_norm_eps=1e-5)
    assert len({first, second, open_checkpoint(folder).fingerprint}) == 3


PANICS = tiny_tokenizer().to_str().replace('"type":"ByteLevel"', '"type":"FixedLength","length":0', 1).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", b"[]", "JSON list; expected an object"),
        ("config.json", b"{", "not valid JSON"),
        ("config.json", b"\xff\xfe", r"config\.json.*UTF-8"),
        ("chat_template.jinja", b"\xff\xfe", r"chat_template\.jinja.*UTF-8"),
        ("tokenizer.json", b'{"a": ' * 100_000, r"tokenizer\.json is not"),
        ("config.json", b"[" * 100_000, "not valid JSON"),
        ("config.json", b"{}", "model_type"),
        ("tokenizer.json", None, "save_pretrained"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Unknown"}}', "not a tokenizer that can be used"),
        ("tokenizer.json", PANICS, "not a tokenizer that can be used"),
        ("generation_config.json", b"null", "generation_config.json"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template"),
        ("tokenizer_config.json", b'{"chat_template": "\\ud800"}', "half a character"),
        ("model.safetensors", None, "neither model.safetensors nor"),
        ("model.safetensors", b"", "safetensors"),
    ],
)
def test_missing_and_broken_files(folder: Path, name: str, content: bytes | None, message: str) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    refused(folder, message)


def test_truncated_weights(folder: Path) -> None:
    checkpoint, path = open_checkpoint(folder), folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refused(folder, r"model\.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        checkpoint.read("model.norm.weight")


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("model__norm__weight", None, r"lacks 1 of .*model\.norm\.weight"),
        ("lm_head__weight", None, "tie_word_embeddings"),
        ("model__layers__1__self_attn__q_proj__bias", torch.ones(64), r"layers\.1.*\.q_proj\.bias.*attention_bias"),
        ("model__norm__weight", torch.ones(63), r"model\.norm\.weight.*\[63\].*\[64\]"),
        ("model__norm__weight", torch.ones(64, 1), r"model\.norm\.weight"),
        ("model__norm__weight", torch.ones(64, dtype=torch.int32), r"model\.norm\.weight.*I32"),
        ("model__norm__weight", torch.ones(64).to(torch.float8_e4m3fn), r"model\.norm\.weight.*F8"),
    ],
)
def test_wrong_tensors(folder: Path, tensor: str, value: torch.Tensor | None, message: str) -> None:
    rewrite(folder, **{tensor: value})
    refused(folder, message)


def test_weights_that_are_not_finite(folder: Path) -> None:
    rewrite(folder, model__norm__weight=torch.tensor([1.0] * 63 + [float("-inf")]))
    weight = open_checkpoint(folder).weights["model.norm.weight"]
    weight.read_rows(0, 63)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        weight.read_rows(0, 64)


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"pickle.*save_pretrained")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        *(
            ({"weight_map": {"model.norm.weight": name}}, "same folder")
            for name in ("../model.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", 3)
        ),
        *((index, "weight_map") for index in ({}, {"weight_map": []}, {"weight_map": {}})),
        ({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}, "model-00001-of-00002"),
    ],
)
def test_an_index_that_is_wrong(folder: Path, index: Any, message: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, message)


@pytest.mark.parametrize(
    "source", ["no-such-folder", "./org/name", "missing/model.gguf", "", "a\0b/c", "org/name/more", "~nobody/x"]
)
def test_no_such_model(source: str) -> None:
    with pytest.raises(CheckpointError):
        open_checkpoint(source)


def test_hub_download(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download = Mock(return_value=str(folder))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_checkpoint("org/name").source == "org/name"
    assert download.call_args.args == ("org/name",)
    wanted = ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
    wanted += ["1_Pooling/config.json", "2_Dense/model.safetensors"]
    others = ["pytorch_model.bin", "README.md", "onnx/config.json", "original/model.safetensors", "8bit/config.json"]
    others += ["consolidated.safetensors"]
    assert list(filter_repo_objects(wanted + others, **download.call_args.kwargs)) == wanted


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError, "'org/name' on the hub is not there"),
        (GatedRepoError, "gated"),
        (ConnectionError, "cannot be reached.*HF_HUB_OFFLINE"),
    ],
)
def test_hub_errors_never_show_the_token(monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str) -> None:
    failure = error.__new__(error)
    failure.args = ("Authorization: Bearer hf_secret",)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=failure))
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint("org/name")
    assert "hf_secret" not in str(raised.value)
    assert raised.value.__suppress_context__


@pytest.mark.parametrize("name", SAFETENSORS_LAYOUTS)
def test_tensors_that_do_not_lie_one_after_another(folder: Path, name: str) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(SAFETENSORS_LAYOUTS[name](path.read_bytes()))
    refused(folder, "not a sound safetensors file")


def test_headers_are_read_once_and_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One with 20,000 tensors would take minutes if it were read again for every weight."""
    checkpoint = open_checkpoint(folder)
    with monkeypatch.context() as closed:
        closed.setattr("dash_export.models.readers.weights._header", None)
        assert all(checkpoint.read(name).shape == weight.shape for name, weight in checkpoint.weights.items())
    monkeypatch.setattr("dash_export.models.readers.weights.MAX_HEADER", 100)
    refused(folder, r"its header has .* bytes; 100 at most")


def test_a_head_beside_a_tied_embedding(folder: Path) -> None:
    """The same one is one; another one would be dropped in silence."""
    edit_config(folder, tie_word_embeddings=True)
    refused(folder, "holds another lm_head")
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, lm_head__weight=table.clone())
    assert open_checkpoint(folder).spec.tie_embeddings


def test_a_tied_model_under_its_heads_name(tmp_path: Path) -> None:
    """As safetensors' save_model leaves it: of two names of one tensor the first."""
    save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    expected = open_checkpoint(tmp_path).read("model.embed_tokens.weight")
    rewrite(tmp_path, model__embed_tokens__weight=None, lm_head__weight=torch.from_numpy(expected))
    np.testing.assert_array_equal(open_checkpoint(tmp_path).read("model.embed_tokens.weight"), expected)


def test_a_tokenizer_of_a_larger_model(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama", vocab_size=200)
    refused(tmp_path, "the embedding has 200 rows")


def test_importing_the_package_is_cheap() -> None:
    heavy = ["safetensors", "gguf", "tokenizers", "huggingface_hub", "torch", "transformers"]
    ran = python(f"import sys, dash_export.models; assert not set({heavy}) & set(sys.modules)")
    assert ran.returncode == 0, ran.stderr


def added(index: str, content: object, **options: bool) -> dict[str, Any]:
    return {"added_tokens_decoder": {index: {"content": content, **options}}}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer_config", added("299", "<tool>"), "names a token '<tool>'"),
        ("tokenizer_config", added("258", "<|im_start|>"), r"names a token '<\|im_start\|>'"),
        ("tokenizer_config", added("257", 5), "names a token 5"),
        ("tokenizer_config", {"eos_token": "<tool>"}, "names a token '<tool>'"),
        ("tokenizer_config", {"pad_token": {"content": "<tool>"}}, "names a token '<tool>'"),
        ("tokenizer_config", {"bos_token": "he"}, "names a token 'he'"),
        ("tokenizer_config", {"additional_special_tokens": ["<|im_end|>", "<tool>"]}, "names a token '<tool>'"),
        ("tokenizer_config", {"extra_special_tokens": {"image_token": "<tool>"}}, "names a token '<tool>'"),
        ("tokenizer_config", {"model_specific_special_tokens": {"image_token": "<tool>"}}, "names a token '<tool>'"),
        ("tokenizer_config", {"image_token": "<tool>"}, "names a token '<tool>'"),
        ("special_tokens_map", {"unk_token": "<tool>"}, "names a token '<tool>'"),
        ("added_tokens", {"<tool>": 259}, "names a token '<tool>'"),
        ("added_tokens", {"<|im_end|>": 257}, r"names a token '<\|im_end\|>'"),
        ("tokenizer_config", added("257", "<|im_start|>", rstrip=True), "sets rstrip"),
        ("tokenizer_config", added("257", "<|im_start|>", single_word=True), "sets single_word"),
        ("tokenizer_config", {"add_prefix_space": True}, "sets add_prefix_space"),
        ("tokenizer_config", {"split_special_tokens": True}, "sets split_special_tokens"),
    ],
)
def test_other_files_that_read_a_text_otherwise(name: str, content: dict[str, Any], said: str, folder: Path) -> None:
    """transformers 5.24 gives other ids for each, or another text."""
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 257}))
    for sound in (added("257", "<|im_start|>"), {"eos_token": "<|im_end|>", "pad_token": None}):
        (folder / "tokenizer_config.json").write_text(json.dumps(sound))
        open_checkpoint(folder)
    (folder / f"{name}.json").write_text(json.dumps(content))
    refused(folder, rf"{said}.*tokenizer\.json does not")


@pytest.mark.parametrize("single", ["<|im_start|> $A", "$A <|im_end|>", "<|im_start|> $A <|im_end|>"])
def test_a_tokenizer_that_ends_every_text(folder: Path, single: str) -> None:
    """As `add_eos_token=True` is saved: each prompt would be an ended text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = [(name, tokenizer.token_to_id(name)) for name in ("<|im_start|>", "<|im_end|>")]
    tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))
    if single.endswith("$A"):
        open_checkpoint(folder)
    else:
        refused(folder, "ends every text with a token")


def test_what_the_map_of_special_tokens_says(folder: Path) -> None:
    """It is read, before tokenizer_config.json, where this has no `added_tokens_decoder`: as transformers has it."""
    bos, other = "<|im_start|>", "<|im_end|>"
    (folder / "chat_template.jinja").write_text("{{ bos_token }}x{{ eos_token }}")
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": bos, "eos_token": {"content": other}}))
    decoder = {"257": {"content": bos, "special": True}, "258": {"content": other, "special": True}}
    made, said = folder / "made", [{"role": "user", "content": "hi"}]
    made.mkdir()
    for settings in ({}, {"bos_token": other}, {"bos_token": other, "eos_token": "", "added_tokens_decoder": decoder}):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        for name, text in open_checkpoint(folder).assets.items():
            (made / name).write_text(text)
        template = Text(made).template
        assert template is not None
        expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(said, tokenize=False)
        assert template.render(said) == expected
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<old>"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<old>": 259}))
    assert open_checkpoint(folder), "files that are not read"


def test_a_text_model_with_a_token_for_pictures(tmp_path: Path) -> None:
    """As Gemma 3's smallest have it: one past the rows of the embedding, which no text can use."""
    model = save_tiny(tmp_path, "gemma3_text", pad_token_id=0)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    rows = model.config.vocab_size
    for name, fits in (("<image_soft_token>", True), ("<more>", False)):
        added = [*tokenizer["added_tokens"], tokenizer["added_tokens"][0] | {"id": rows, "content": name}]
        vocab = tokenizer["model"]["vocab"] | {f"x{index}": index for index in range(259, rows)} | {name: rows}
        made = tokenizer | {"added_tokens": added, "model": tokenizer["model"] | {"vocab": vocab}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(made))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"image_token": name}))
        with nullcontext() if fits else pytest.raises(CheckpointError, match="has tokens up to"):
            found = Tokenizer.from_str(open_checkpoint(tmp_path).assets["tokenizer.json"])
            assert found.token_to_id(name) is None
            assert found.encode("hello").ids == Tokenizer.from_str(json.dumps(made)).encode("hello").ids
