"""A Hugging Face model folder, or one fetched from the hub, as a Checkpoint."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dash_export.bundle.hub import download
from dash_export.bundle.layout import PREPROCESSOR, TEXT_FILES
from dash_export.core.facts import LARGEST
from dash_export.errors import CheckpointError
from dash_export.files.artifacts import identity
from dash_export.files.typed_json import shown
from dash_export.models.config import ENCODERS, TEXT_ENCODERS, decoder_spec, positive
from dash_export.models.readers.encoder_folder import open_encoder
from dash_export.models.readers.published import family_config, family_name
from dash_export.models.readers.weights import build_checkpoint, open_weights, read_json, read_text, unfused
from dash_export.models.spec import AnyCheckpoint, DecoderSpec, Weight, layer_weight, row_blocks
from dash_export.text.text_files import load_tokenizer

_HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]
_PICTURES = "<image_soft_token>"
_HUB_IGNORED = ["[!0-9]*/*", "[0-9][!_]*/*", "consolidated*"]
"""Other formats' folders (but 1_Pooling and its like are read), Mistral's second copy of the weights."""


def open_folder(folder: Path, source: str = "") -> AnyCheckpoint:
    """Return the checkpoint of a folder with config.json, safetensors weights and tokenizer.json, or for an encoder
    preprocessor_config.json. `source`: the name that the user gave the model; the folder's path by default.

    Raises CheckpointError naming the file, option or tensor that is missing, unsupported or damaged.
    """
    source = source or str(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; expected a Hugging Face model folder")
    files = _weight_files(folder)
    # Identify all files before reading any of them, so that `check_same` notices one that is replaced from here on.
    texts = (folder / name for name in (*TEXT_FILES, PREPROCESSOR))
    seen = {path: identity(path) for path in (*files, *texts) if path.exists()}
    config_text, given = read_json(folder / "config.json")
    if (config := family_config(given)) is not given:
        config_text = json.dumps(config, indent=2) + "\n"
    assets = {"config.json": config_text}
    if config.get("model_type") in (*ENCODERS, *TEXT_ENCODERS):
        if config["model_type"] in TEXT_ENCODERS:
            assets |= _text_assets(folder, positive(config, "vocab_size", LARGEST["vocab_size"]), continued=False)
        return open_encoder(folder, source, assets, config, files, seen)
    spec = decoder_spec(config, Path(source).absolute().name)  # "." has no name
    assets |= _text_assets(folder, spec.vocab_size)
    stored = open_weights(files)
    if config is not given:
        stored = {family_name(name): weight for name, weight in stored.items()}
    if "embed_tokens.weight" in stored and "model.embed_tokens.weight" not in stored:  # saved as a base model
        stored = {name if name.startswith("lm_head.") else f"model.{name}": stored[name] for name in stored}
    tied, table = "lm_head.weight", "model.embed_tokens.weight"
    if spec.tie_embeddings and tied in stored and table not in stored:  # save_model keeps one of two tied names
        stored[table] = replace(stored.pop(tied), name=table)
    stored = unfused(spec if config is given else replace(spec, fused=True), stored)
    stored = {name: _with_norm_offset(spec, weight) for name, weight in stored.items()}
    _refuse_unused(spec, stored, folder)
    return build_checkpoint(source, spec, config, stored, assets, files, seen)


def open_hub(model_id: str) -> AnyCheckpoint:
    """Return the checkpoint of `org/name`, from the hub or the usual cache. Raises CheckpointError."""
    folder = download(model_id, CheckpointError, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_IGNORED)
    return open_folder(folder, model_id)


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files. Raises CheckpointError when there are none or the index is not sound."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        if any(path.suffix in {".bin", ".pt", ".pth"} for path in folder.iterdir()):
            raise CheckpointError(
                f"{folder} has its weights as pickle (.bin, .pt) only, which can run code and is never opened; convert "
                "them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder, safe_serialization=True)"
            )
        raise CheckpointError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    weight_map = read_json(index)[1].get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no 'weight_map' object from tensor names to files")
    for tensor, name in weight_map.items():
        # A plain file name only: the index is untrusted and must not point out of its folder.
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} places tensor {tensor[:100]!r} in {str(name)[:100]!r}; "
                "expected the name of a .safetensors file in the same folder"
            )
    return [folder / name for name in sorted(set(weight_map.values()))]


def _with_norm_offset(spec: DecoderSpec, weight: Weight) -> Weight:
    """Return a norm's gain with the `norm_offset` added that the family's files lack; other weights as they are."""
    if not spec.norm_offset or not weight.name.endswith("norm.weight"):
        return weight
    return replace(weight, rows=lambda *rows: np.asarray(weight.rows(*rows), np.float32) + np.float32(spec.norm_offset))


def _refuse_unused(spec: DecoderSpec, stored: dict[str, Weight], folder: Path) -> None:
    """Raise CheckpointError for a tensor that would be dropped silently and change the model: a layer's tensor that the
    spec does not know (a bias, a scale), or a head that differs from the embedding it is tied to (transformers 5 would
    use that head, this package the embedding).
    """
    layers = tuple(layer_weight(index) for index in range(spec.num_layers))
    extra = (name for name in stored.keys() - spec.weight_shapes().keys() if name.startswith(layers))
    unused = sorted(name for name in extra if not name.endswith("rotary_emb.inv_freq"))  # old files carry those buffers
    if unused:
        raise CheckpointError(
            f"{folder} holds {len(unused)} tensors that its config does not use, the first is {unused[0][:100]!r}; "
            'set the option in config.json (such as "attention_bias": true) or this variant is not supported'
        )
    head, table = stored.get("lm_head.weight"), stored.get("model.embed_tokens.weight")
    expected = spec.weight_shapes()["model.embed_tokens.weight"]  # `build_checkpoint` refuses another shape
    if spec.tie_embeddings and head is not None and table is not None and table.shape == expected:
        blocks = zip(row_blocks(head), row_blocks(table), strict=False)
        if head.shape != table.shape or not all(np.array_equal(one, other) for one, other in blocks):
            raise CheckpointError(
                f"{folder} ties the head to the embedding (tie_word_embeddings) and holds another lm_head.weight: set "
                '"tie_word_embeddings": false in config.json to use it, or remove that tensor'
            )


def _text_assets(folder: Path, vocab_size: int, continued: bool = True) -> dict[str, str]:
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json; make one from the older tokenizer files with "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    read = {name: read_json(folder / name) for name in TEXT_FILES[1:-1] if (folder / name).is_file()}
    assets = {name: text for name, (text, _) in read.items()}
    tokenizer, settings = read["tokenizer.json"][1], read.get("tokenizer_config.json", ("", {}))[1]
    assets["tokenizer.json"] = _without_pictures(tokenizer, assets["tokenizer.json"], vocab_size)
    _check_vocabulary(assets["tokenizer.json"], folder / "tokenizer.json", vocab_size, continued)
    added: dict[str, Any] = {}
    if "added_tokens_decoder" not in settings:  # only then does transformers read these older files
        named, added = (
            read_json(folder / name)[1] if (folder / name).is_file() else {}
            for name in ("special_tokens_map.json", "added_tokens.json")
        )
        if told := {name: token for name, token in named.items() if name.endswith(("_token", "_tokens"))}:
            settings = settings | told
            assets["tokenizer_config.json"] = json.dumps(settings, indent=2) + "\n"
    _check_added(settings, added, folder, tokenizer)
    _check_reading(settings, folder / "tokenizer_config.json", tokenizer)
    if template := _chat_template(settings, folder / "tokenizer_config.json"):
        assets["chat_template.jinja"] = template
    if (path := folder / "chat_template.jinja").is_file():
        assets[path.name] = read_text(path)
    return assets


def _without_pictures(tokenizer: dict[str, Any], text: str, vocab_size: int) -> str:
    """Return tokenizer.json without Gemma 3's image token where the embedding, a text model's, has no row for it."""
    tokens, model = _entries(tokenizer.get("added_tokens")), tokenizer.get("model")
    kept = [one for one in tokens if one.get("content") != _PICTURES or one.get("id") != vocab_size]
    if len(kept) == len(tokens) or not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        return text
    vocabulary = {token: index for token, index in model["vocab"].items() if token != _PICTURES}
    return json.dumps(tokenizer | {"added_tokens": kept, "model": model | {"vocab": vocabulary}}, ensure_ascii=False)


def _check_added(settings: dict[str, Any], added: dict[str, Any], folder: Path, tokenizer: dict[str, Any]) -> None:
    """Raise CheckpointError for a token that only other files name: here it would be several of plain text."""
    known = {token.get("content"): str(token.get("id")) for token in _entries(tokenizer.get("added_tokens"))}
    tokens: list[tuple[object, object]] = [*added.items()]  # (text, id or None)
    decoder = settings.get("added_tokens_decoder")
    for index, token in decoder.items() if isinstance(decoder, dict) else ():
        tokens.append((token.get("content") if isinstance(token, dict) else None, index))
    said = [token for name, token in settings.items() if name.endswith("_token")]
    for name in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
        several = settings.get(name)
        said += several.values() if isinstance(several, dict) else several if isinstance(several, list) else []
    said = [one.get("content") if isinstance(one, dict) else one for one in said]
    tokens += [(one, None) for one in said if isinstance(one, str) and one]  # add_bos_token is a bool
    for content, index in tokens:
        found = known.get(content) if isinstance(content, str) else None
        if found is None or (index is not None and str(index) != found):
            raise CheckpointError(
                f"{folder} names a token {shown(content)} that tokenizer.json does not add"
                f"{'' if index is None else f' as {shown(index)}'}: write its tokenizer anew with "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder), or take the token out of "
                "tokenizer_config.json, special_tokens_map.json and added_tokens.json"
            )


def _entries(found: Any) -> list[dict[str, Any]]:
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _check_reading(settings: dict[str, Any], path: Path, tokenizer: dict[str, Any]) -> None:
    """Raise CheckpointError for an option that makes transformers tokenize in another way than tokenizer.json says."""
    added, given = tokenizer.get("added_tokens"), settings.get("added_tokens_decoder")
    flags = {str(token.get("id")): token for token in _entries(added)}
    decoder = given.items() if isinstance(given, dict) else ()
    wrong = [
        f"{name} of token {shown(index)}"
        for index, token in decoder
        for name in ("lstrip", "rstrip", "single_word")
        if bool(token.get(name)) and not flags.get(index, {}).get(name)
    ]
    before = tokenizer.get("pre_tokenizer")
    parts = before.get("pretokenizers", [before]) if isinstance(before, dict) else []
    byte_level = [part for part in parts if isinstance(part, dict) and part.get("type") == "ByteLevel"]
    if settings.get("add_prefix_space") is True and any(part.get("add_prefix_space") is False for part in byte_level):
        wrong.append("add_prefix_space")
    if settings.get("split_special_tokens") is True:
        wrong.append("split_special_tokens")
    if wrong:
        raise CheckpointError(
            f"{path} sets {wrong[0]}, which tokenizer.json does not: write both anew with "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder), or take the option out"
        )


def _check_vocabulary(text: str, path: Path, vocab_size: int, continued: bool) -> None:
    try:
        tokenizer = load_tokenizer(text)
        tokens = tokenizer.get_vocab(with_added_tokens=True)
        plain, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in tokenizers is no Exception
        raise CheckpointError(f"{path} is not a tokenizer that can be used: {error}") from error
    if continued and whole[len(whole) - len(plain) :] != plain:
        raise CheckpointError(
            f"{path} ends every text with a token (add_eos_token): a prompt would be an ended text. Write it anew with "
            "AutoTokenizer.from_pretrained(folder, add_eos_token=False).save_pretrained(folder)"
        )
    if (largest := max(tokens.values(), default=0)) >= vocab_size:
        raise CheckpointError(
            f"{path} has tokens up to {largest}, and the embedding has {vocab_size} rows: take the tokenizer that the "
            "model was trained with"
        )


def _chat_template(tokenizer_config: dict[str, Any], path: Path) -> str | None:
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = (entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default")
        template = next(named, {}).get("template")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"'chat_template' in {path} is {shown(template)}; expected a string")
    try:
        (template or "").encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"'chat_template' in {path} has half a character in it ({error.reason})") from error
    return template
