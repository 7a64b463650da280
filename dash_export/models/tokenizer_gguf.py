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

_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA_CPP_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


_CONTROL, _USER_DEFINED = 3, 4  # token types; there are 1 to 6


def _split_then_bytes(*patterns: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    def made() -> pre_tokenizers.PreTokenizer:
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    return made


def _smollm() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": _smollm,
    "qwen2": _split_then_bytes(_QWEN2),
    "llama-bpe": _split_then_bytes(_LLAMA3),
    "llama3": _split_then_bytes(_LLAMA3),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "default": _split_then_bytes(*_LLAMA_CPP_DEFAULT),
}
# As llama.cpp does for these names: a word that is a token is that token, and a text begins with bos.
_IGNORES_MERGES = _ADDS_BOS = ("llama-bpe", "llama3")


def tokenizer_assets(metadata: Mapping[str, Any], vocab_size: int) -> dict[str, str]:
    """tokenizer.json, tokenizer_config.json, generation_config.json and, if there is one, chat_template.jinja.

    `vocab_size` is the number of rows of the embedding: more tokens than that are an error.
    Raises CheckpointError for a tokenizer of another kind and for inconsistent vocabularies.
    """
    for key, known in (("model", ("gpt2",)), ("pre", tuple(_PRE_TOKENIZERS))):
        if (value := metadata.get(f"tokenizer.ggml.{key}")) not in known:
            raise CheckpointError(
                f"GGUF tokenizer.ggml.{key} {shown(value)} is not supported; supported: {', '.join(known)} (byte-level "
                "BPE). Export from the model's Hugging Face folder instead"
            )
    tokens, pre = _strings(metadata, "tokenizer.ggml.tokens"), metadata["tokenizer.ggml.pre"]
    if not 0 < len(tokens) <= vocab_size:
        raise CheckpointError(
            f"the GGUF vocabulary has {len(tokens)} tokens; expected 1 to {vocab_size}, the embedding's rows"
        )
    if len(set(tokens)) != len(tokens):
        raise CheckpointError("tokenizer.ggml.tokens holds a token twice; the file is damaged")
    template = metadata.get("tokenizer.chat_template", "")
    if not isinstance(template, str):
        raise CheckpointError(f"tokenizer.chat_template is {shown(template)}; expected a string")
    bos, eos, pad, eot = (token_id(metadata, name) for name in ("bos", "eos", "padding", "eot"))
    add_bos = flag(metadata, "tokenizer.ggml.add_bos_token", pre in _ADDS_BOS) and bos is not None
    text = _tokenizer(metadata, tokens, pre, bos if add_bos else None).to_str()
    try:
        load_tokenizer(text)  # as what runs the bundle will
    except ValueError as error:
        raise CheckpointError(f"the GGUF vocabulary cannot be used: {error}") from error
    ids = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    tokenizer_config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "clean_up_tokenization_spaces": False,
        **{name: tokens[index] for name, index in ids.items() if index is not None},
    }
    # llama.cpp ends generation at the end of a turn as well as at the end of the text.
    ends = list(dict.fromkeys(end for end in (eos, eot) if end is not None))
    generation = {"bos_token_id": bos, "eos_token_id": ends[0] if len(ends) == 1 else ends, "pad_token_id": pad}
    return {
        "tokenizer.json": text,
        "tokenizer_config.json": _json(tokenizer_config),
        "generation_config.json": _json({key: value for key, value in generation.items() if value not in (None, [])}),
    } | ({"chat_template.jinja": template} if "tokenizer.chat_template" in metadata else {})


def token_id(metadata: Mapping[str, Any], name: str) -> int | None:
    """`tokenizer.ggml.<name>_token_id`, checked against the vocabulary, or None. Raises CheckpointError."""
    key = f"tokenizer.ggml.{name}_token_id"
    if (value := metadata.get(key)) is None:
        return None
    count = len(_strings(metadata, "tokenizer.ggml.tokens"))
    if type(value) is not int or not 0 <= value < count:
        raise CheckpointError(f"{key} is {shown(value)}; expected the index of one of the {count} tokens")
    return value


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"{key} is {shown(values)}; expected an array of strings")
    return values


def _tokenizer(metadata: Mapping[str, Any], tokens: list[str], pre: str, bos: int | None) -> Tokenizer:
    halves = [merge.partition(" ") for merge in _strings(metadata, "tokenizer.ggml.merges")]
    if not all(left and right and " " not in right for left, _, right in halves):
        raise CheckpointError("tokenizer.ggml.merges holds a merge that is not two tokens; the file is damaged")
    merges = [(left, right) for left, _, right in halves]
    kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    sound = isinstance(kinds, list) and all(type(kind) is int and 1 <= kind <= 6 for kind in kinds)
    if not sound or len(kinds) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.token_type is {shown(kinds)}; expected an integer of 1 to 6 per token")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    of_kind = {kind: [token for token, own in zip(tokens, kinds, strict=True) if own == kind] for kind in set(kinds)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _IGNORES_MERGES))
        special = [AddedToken(token, normalized=False, special=True) for token in of_kind.get(_CONTROL, ())]
        tokenizer.add_special_tokens(special)
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in of_kind.get(_USER_DEFINED, ())])
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


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
