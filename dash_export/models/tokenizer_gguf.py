"""The tokenizer files of a GGUF model: byte-level BPE with the pre-tokenizer that `tokenizer.ggml.pre` names.

The pre-tokenizers are those of the models' own tokenizer.json. (transformers' GGUF conversion ignores the name and
gives SmolLM wrong ids for digits, as in "\\n\\n1.") `default` is llama.cpp's fallback for converters that knew no name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from dash_export.errors import CheckpointError
from dash_export.models.fields import flag, shown
from dash_export.text_files import load_tokenizer

_CONTROL, _USER_DEFINED = 3, 4

_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA_CPP_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


def tokenizer_assets(metadata: Mapping[str, Any], vocab_size: int) -> dict[str, str]:
    """tokenizer.json, tokenizer_config.json, generation_config.json and, if there is one, chat_template.jinja.

    `vocab_size` is the number of rows of the embedding: more tokens than that are an error.
    Raises CheckpointError for a tokenizer of another kind and for inconsistent vocabularies.
    """
    tokens = _tokens(metadata, vocab_size)
    bos, eos, pad = (token_id(metadata, name) for name in ("bos", "eos", "padding"))
    pre = _pre_tokenizer_name(metadata)
    add_bos = flag(metadata, "tokenizer.ggml.add_bos_token", pre in _ADDS_BOS) and bos is not None
    tokenizer = _tokenizer(metadata, tokens, pre, bos if add_bos else None)
    tokenizer_config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "clean_up_tokenization_spaces": False,
    }
    for name, index in (("bos_token", bos), ("eos_token", eos), ("pad_token", pad)):
        if index is not None:
            tokenizer_config[name] = tokens[index]
    text = tokenizer.to_str()
    try:
        load_tokenizer(text)  # as what runs the bundle will
    except ValueError as error:
        raise CheckpointError(f"the GGUF vocabulary cannot be used: {error}") from error
    assets = {
        "tokenizer.json": text,
        "tokenizer_config.json": _json(tokenizer_config),
        "generation_config.json": _json(_generation_config(metadata, bos, eos, pad)),
    }
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        if not isinstance(template, str):
            raise CheckpointError(f"tokenizer.chat_template is {shown(template)}; expected a string")
        assets["chat_template.jinja"] = template
    return assets


def token_id(metadata: Mapping[str, Any], name: str) -> int | None:
    """`tokenizer.ggml.<name>_token_id`, checked against the vocabulary, or None. Raises CheckpointError."""
    key = f"tokenizer.ggml.{name}_token_id"
    value, tokens = metadata.get(key), metadata.get("tokenizer.ggml.tokens")
    if value is None:
        return None
    count = len(tokens) if isinstance(tokens, list) else 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise CheckpointError(f"{key} is {shown(value)}; expected the index of one of the {count} tokens")
    return value


def _generation_config(
    metadata: Mapping[str, Any], bos: int | None, eos: int | None, pad: int | None
) -> dict[str, Any]:
    # llama.cpp ends generation at the end of a turn as well as at the end of the text.
    ends = [end for end in (eos, token_id(metadata, "eot")) if end is not None]
    config: dict[str, Any] = {
        "bos_token_id": bos,
        "eos_token_id": sorted(set(ends), key=ends.index),
        "pad_token_id": pad,
    }
    if len(config["eos_token_id"]) == 1:
        config["eos_token_id"] = config["eos_token_id"][0]
    return {key: value for key, value in config.items() if value not in (None, [])}


def _pre_tokenizer_name(metadata: Mapping[str, Any]) -> str:
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2":
        raise CheckpointError(
            f"GGUF tokenizer model {shown(model)} is not supported; supported: 'gpt2' (byte-level BPE). "
            "Export from the model's Hugging Face folder instead"
        )
    if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"GGUF pre-tokenizer (tokenizer.ggml.pre) {shown(pre)} is not supported; "
            f"supported: {', '.join(_PRE_TOKENIZERS)}. Export from the model's Hugging Face folder instead"
        )
    return pre


def _tokens(metadata: Mapping[str, Any], vocab_size: int) -> list[str]:
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    if not 0 < len(tokens) <= vocab_size:
        raise CheckpointError(
            f"the GGUF vocabulary has {len(tokens)} tokens; expected 1 to {vocab_size}, the embedding's rows"
        )
    if len(set(tokens)) != len(tokens):
        raise CheckpointError("tokenizer.ggml.tokens holds a token twice; the file is damaged")
    return tokens


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"{key} is {shown(values)}; expected an array of strings")
    return values


def _tokenizer(metadata: Mapping[str, Any], tokens: list[str], pre: str, bos: int | None) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = _merges(metadata)
    kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    sound = isinstance(kinds, list) and all(type(kind) is int and 1 <= kind <= 6 for kind in kinds)
    if not sound or len(kinds) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.token_type is {shown(kinds)}; expected an integer of 1 to 6 per token")
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _IGNORES_MERGES))
        special = [
            AddedToken(t, normalized=False, special=True)
            for t, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL
        ]
        added = [
            AddedToken(t, normalized=False) for t, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED
        ]
        tokenizer.add_special_tokens(special)
        tokenizer.add_tokens(added)
    except Exception as error:
        raise CheckpointError(f"the GGUF vocabulary is not consistent: {error}") from error
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos is not None:
        if tokens[bos].startswith("$") or ":" in tokens[bos]:  # marks of the template's own language
            raise CheckpointError(f"texts begin with the token {shown(tokens[bos])}, which is not supported")
        template = processors.TemplateProcessing(
            single=[tokens[bos], "$A"],
            pair=[tokens[bos], "$A", f"{tokens[bos]}:1", "$B:1"],
            special_tokens=[(tokens[bos], bos)],
        )
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, template])
    return tokenizer


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for merge in _strings(metadata, "tokenizer.ggml.merges"):
        left, space, right = merge.partition(" ")
        if not left or not space or not right or " " in right:
            raise CheckpointError("tokenizer.ggml.merges holds a merge that is not two tokens; the file is damaged")
        merges.append((left, right))
    return merges


def _split_then_bytes(*patterns: str) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _smollm() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": _smollm,
    "qwen2": lambda: _split_then_bytes(_QWEN2),
    "llama-bpe": lambda: _split_then_bytes(_LLAMA3),
    "llama3": lambda: _split_then_bytes(_LLAMA3),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "default": lambda: _split_then_bytes(*_LLAMA_CPP_DEFAULT),
}
# As llama.cpp does for these names: a word that is a token is that token, and a text begins with bos.
_IGNORES_MERGES = _ADDS_BOS = ("llama-bpe", "llama3")


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
