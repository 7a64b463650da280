"""A Hugging Face model folder, or one fetched from the hub, as a Checkpoint."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dash_export.artifacts import identity
from dash_export.bundle import TEXT_FILES
from dash_export.errors import CheckpointError
from dash_export.models.fields import shown
from dash_export.models.registry import decoder_spec
from dash_export.models.spec import Checkpoint, DecoderSpec
from dash_export.models.weights import (
    SafetensorsWeight,
    check_dtype,
    check_weights,
    fingerprint,
    open_weights,
    parse_object,
    read_text,
    require,
    weight_files,
)
from dash_export.text_files import load_tokenizer

ROWS = 4096
"""Of a matrix, in memory at a time."""
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]
_HUB_IGNORED = ["*/*", "consolidated*"]  # other formats' folders, Mistral's second copy of the weights


def open_folder(folder: Path) -> Checkpoint:
    """The model in a folder with config.json, safetensors weights and tokenizer.json.

    Raises CheckpointError naming the file, option or tensor that is missing, unsupported or damaged.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; expected a Hugging Face model folder")
    files = weight_files(folder)
    # First, and of all: what is replaced from here on is noticed.
    seen = {path: identity(path) for path in (*files, *(folder / name for name in TEXT_FILES)) if path.exists()}
    config_text = read_text(folder / "config.json")
    config = parse_object(config_text, str(folder / "config.json"))
    spec = decoder_spec(config)
    assets = {"config.json": config_text} | _text_assets(folder, spec.vocab_size)
    stored = _with_prefix(open_weights(files))
    weights = check_weights(spec, stored, str(folder))
    _refuse_unused(spec, stored, folder)
    _refuse_second_head(spec, stored, folder)
    tensors = []
    for name, weight in weights.items():
        check_dtype(weight)
        tensors.append(f"{name} {list(weight.shape)} {weight.dtype}")
    return Checkpoint(
        source=str(folder),
        spec=spec,
        config=config,
        weights=weights,
        assets=assets,
        fingerprint=fingerprint(config_text, tensors, files),
        seen=seen,
    )


def open_hub(model_id: str) -> Checkpoint:
    """The model `org/name` of the hub, downloaded into (or found in) the usual cache. Raises CheckpointError."""
    hub = require("huggingface_hub")
    errors = require("huggingface_hub.errors")
    try:
        folder = hub.snapshot_download(model_id, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_IGNORED)
    # `from None` and no text of theirs: requests and responses can carry the access token.
    except errors.GatedRepoError:
        raise CheckpointError(
            f"the hub model {model_id!r} is gated: accept its terms on its page, then log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"the hub has no model {model_id!r} that you may read; check the spelling, or `hf auth login` if private"
        ) from None
    except errors.HFValidationError:
        raise CheckpointError(f"{model_id!r} is neither a path that exists nor a valid hub id (org/name)") from None
    except Exception as error:
        raise CheckpointError(
            f"cannot download {model_id!r} ({type(error).__name__}): the hub cannot be reached (or is switched off by "
            "HF_HUB_OFFLINE) and the model is not in the local cache; connect, or give the path of a local folder"
        ) from None
    return replace(open_folder(Path(folder)), source=model_id)


def _with_prefix(weights: dict[str, SafetensorsWeight]) -> dict[str, SafetensorsWeight]:
    """`weights` under the names of a model with a head: a base model saved alone lacks the `model.` prefix."""
    if "model.embed_tokens.weight" in weights or "embed_tokens.weight" not in weights:
        return weights
    return {name if name.startswith("lm_head.") else f"model.{name}": weight for name, weight in weights.items()}


def _refuse_unused(spec: DecoderSpec, stored: dict[str, SafetensorsWeight], folder: Path) -> None:
    """A layer's tensor that the spec does not know (a bias, a scale) would be dropped in silence: another model."""
    layers = tuple(f"model.layers.{index}." for index in range(spec.num_layers))
    extra = (name for name in stored.keys() - spec.weight_shapes().keys() if name.startswith(layers))
    unused = sorted(name for name in extra if not name.endswith("rotary_emb.inv_freq"))  # old files carry those buffers
    if unused:
        raise CheckpointError(
            f"{folder} holds {len(unused)} tensors that its config does not use, the first is {unused[0][:100]!r}; "
            'set the option in config.json (such as "attention_bias": true) or this variant is not supported'
        )


def _refuse_second_head(spec: DecoderSpec, stored: dict[str, SafetensorsWeight], folder: Path) -> None:
    """A head that is stored beside a tied embedding must be the same: transformers 5 takes it, we the embedding."""
    head = stored.get("lm_head.weight")
    if head is None or not spec.tie_embeddings:
        return
    check_dtype(head)
    table = stored["model.embed_tokens.weight"]
    same = head.shape == table.shape and all(
        np.array_equal(head.read_rows(start, stop), table.read_rows(start, stop))
        for start, stop in pairwise([*range(0, spec.vocab_size, ROWS), spec.vocab_size])
    )
    if not same:
        raise CheckpointError(
            f"{folder} ties the head to the embedding (tie_word_embeddings) and holds another lm_head.weight: set "
            '"tie_word_embeddings": false in config.json to use it, or remove that tensor'
        )


def _text_assets(folder: Path, vocab_size: int) -> dict[str, str]:
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json; make one from the older tokenizer files with "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    assets: dict[str, str] = {}
    for name in TEXT_FILES[1:-1]:
        if (folder / name).is_file():
            assets[name] = read_text(folder / name)
            parsed = parse_object(assets[name], str(folder / name))
            if name == "tokenizer.json":
                _check_tokenizer(assets[name], folder / name, vocab_size)
            if name == "tokenizer_config.json" and (template := _chat_template(parsed, folder / name)):
                assets["chat_template.jinja"] = template
    if (folder / "chat_template.jinja").is_file():
        assets["chat_template.jinja"] = read_text(folder / "chat_template.jinja")
    return assets


def _check_tokenizer(text: str, path: Path, vocab_size: int) -> None:
    try:
        tokens = load_tokenizer(text).get_vocab(with_added_tokens=True)
    except ValueError as error:
        raise CheckpointError(f"{path} is not a tokenizer that can be used: {error}") from error
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
