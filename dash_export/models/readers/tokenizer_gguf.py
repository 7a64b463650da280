"""The tokenizer files of a GGUF model: byte-level BPE with the pre-tokenizer that `tokenizer.ggml.pre` names, or a
SentencePiece vocabulary (tokenizer_spm.py).

The pre-tokenizers are those of the models' own tokenizer.json. (transformers' GGUF conversion ignores the name and
gives SmolLM wrong ids for digits, as in "\\n\\n1.") `default` is llama.cpp's fallback for converters that knew no name.
"""

import json
from collections.abc import Mapping
from typing import Any

from dash_export.errors import CheckpointError
from dash_export.files.typed_json import shown
from dash_export.models.config import flag
from dash_export.models.readers.tokenizer_spm import spm_parts
from dash_export.text.text_files import check_vocabulary, load_tokenizer

_BPE, _SPM = "gpt2", "llama"
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # token types; there are 1 to 6
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = tuple(rf"[^\r\n\p{{L}}\p{{N}}]?{word}" for word in (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*"))
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = "|".join(_WORDS) + r"|\p{N}" + _REST
_GPT4O = "".join(rf"{word}(?i:'s|'t|'re|'ve|'m|'ll|'d)?|" for word in _WORDS) + r"\p{N}{1,3}" + _REST
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA_CPP_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


def _split(*patterns: str) -> dict[str, Any]:
    splits = [{"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False} for one in patterns]
    return {"type": "Sequence", "pretokenizers": [*splits, _BYTES | {"use_regex": False}]}


_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTES]}
_PRE_TOKENIZERS = {
    "smollm": _DIGITS,
    "refact": _DIGITS,  # of Granite 3
    "qwen2": _split(_QWEN2),
    "deepseek-r1-qwen": _split(_QWEN2),
    "llama-bpe": _split(_LLAMA3),
    "llama3": _split(_LLAMA3),
    "llama-v3": _split(_LLAMA3),
    "falcon3": _split(_LLAMA3),
    "pixtral": _split(_LLAMA3),
    "smaug-bpe": _split(_LLAMA3),  # of SmolLM3
    "dbrx": _split(_LLAMA3),  # of OLMo 2
    "tekken": _split(_TEKKEN),  # of Mistral Nemo
    "gpt-4o": _split(_GPT4O),  # of Phi 4 mini
    "gpt-2": _BYTES,
    "default": _split(*_LLAMA_CPP_DEFAULT),
}
# llama.cpp, for these names, takes a word that is in the vocabulary as that token, and begins a text with bos.
_IGNORES_MERGES = _ADDS_BOS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")


_ENDS = {
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>"),
    *("<EOT>", "_<EOT>", "<eos>", "<end_of_utterance>", "[EOS]", "[EOT]", "[PAD]", "<PAD>"),
    *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>", "<fim-repo>", "<REPO>"),  # between files of code
    *("<|repo_name|>", "<reponame>", "<|file_sep|>"),
}
"""Names of the tokens at which llama.cpp ends an answer. `</s>` is one only as a control token: else it may be HTML."""
_SPM_IDS = 1, 2
"""Ids of the beginning and the end of a text in SentencePiece's vocabularies, for files that name none."""
_GEMMA = ("<start_of_turn>", "<start_of_image>", "<end_of_image>")
"""Special tokens that Google's own GGUF files of Gemma have as plain ones."""
_KEEPS_SPACE = ("<unk>", "<s>", "<|endoftext|>")
"""Special tokens of Phi-3 that keep the white space after them; in its own tokenizer.json the others strip it."""


def tokenizer_assets(metadata: Mapping[str, Any], vocab_size: int) -> dict[str, str]:
    """Return tokenizer.json, tokenizer_config.json, generation_config.json and, if there is one, chat_template.jinja.

    `vocab_size` is the number of rows of the embedding: more tokens than that are an error.
    Raises CheckpointError for an unsupported kind of tokenizer and for inconsistent vocabularies.
    """
    wanted: dict[str, tuple[str, ...]] = {"model": (_BPE, _SPM)}
    if metadata.get("tokenizer.ggml.model") == _BPE:
        wanted["pre"] = tuple(_PRE_TOKENIZERS)
        usual = "qwen2" if metadata.get("general.architecture") == "qwen2" else "default"
        metadata = {"tokenizer.ggml.pre": usual, **metadata}  # as llama.cpp reads files from before May 2024
    for key, known in wanted.items():
        if (value := metadata.get(f"tokenizer.ggml.{key}")) not in known:
            raise CheckpointError(
                f"GGUF tokenizer.ggml.{key} {shown(value)} is not supported; supported: {', '.join(known)}. Export "
                "from the model's Hugging Face folder instead"
            )
    tokens, pre = _strings(metadata, "tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.pre")
    spm = metadata["tokenizer.ggml.model"] == _SPM
    if not 0 < len(tokens) <= vocab_size:
        raise CheckpointError(
            f"the GGUF vocabulary has {len(tokens)} tokens; expected 1 to {vocab_size}, the embedding's rows"
        )
    if len(set(tokens)) != len(tokens):
        raise CheckpointError("tokenizer.ggml.tokens holds a token twice; the file is damaged")
    template = metadata.get("tokenizer.chat_template", "")
    if not isinstance(template, str):
        raise CheckpointError(f"tokenizer.chat_template is {shown(template)}; expected a string")
    bos, eos, pad, eot, eom = (token_id(metadata, name) for name in ("bos", "eos", "padding", "eot", "eom"))
    if spm and len(tokens) > max(_SPM_IDS):  # old files lack the ids
        bos, eos = (known if told is None else told for told, known in zip((bos, eos), _SPM_IDS, strict=True))
    add_bos = flag(metadata, "tokenizer.ggml.add_bos_token", spm or pre in _ADDS_BOS) and bos is not None
    if flag(metadata, "tokenizer.ggml.add_eos_token", False):
        raise CheckpointError("tokenizer.ggml.add_eos_token is not supported: every prompt would be an ended text")
    kinds = _kinds(metadata, tokens)
    # llama.cpp also ends generation at an end-of-turn token, which it knows by its name.
    named = [
        index for index, token in enumerate(tokens) if token in _ENDS or (token == "</s>" and kinds[index] == _CONTROL)
    ]
    ends = list(dict.fromkeys(end for end in (eos, eot, eom, *named) if end is not None))
    gemma = _GEMMA if str(metadata.get("general.architecture")).startswith("gemma") else ()
    for index in (*named, *(tokens.index(token) for token in gemma if token in tokens)):
        kinds[index] = _CONTROL
    parts = spm_parts(metadata, tokens, kinds) if spm else _bpe_parts(metadata, tokens, str(pre))
    rstrip = metadata.get("general.architecture") == "phi3" and spm
    made = _tokenizer(tokens, kinds, parts, bos if add_bos else None, rstrip)
    try:
        text = load_tokenizer(json.dumps(made, ensure_ascii=False)).to_str()  # loaded as the runtime will load it
    except ValueError as error:
        raise CheckpointError(f"the GGUF vocabulary cannot be used: {error}") from error
    ids = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    tokenizer_config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "clean_up_tokenization_spaces": False,
        **{name: tokens[index] for name, index in ids.items() if index is not None},
    }
    generation = {"bos_token_id": bos, "eos_token_id": ends[0] if len(ends) == 1 else ends, "pad_token_id": pad}
    return {
        "tokenizer.json": text,
        "tokenizer_config.json": _json(tokenizer_config),
        "generation_config.json": _json({key: value for key, value in generation.items() if value not in (None, [])}),
    } | ({"chat_template.jinja": template} if "tokenizer.chat_template" in metadata else {})


def token_id(metadata: Mapping[str, Any], name: str) -> int | None:
    """Return `tokenizer.ggml.<name>_token_id` or None. Raises CheckpointError for an id outside the vocabulary."""
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


def _kinds(metadata: Mapping[str, Any], tokens: list[str]) -> list[int]:
    kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens) or not all(kind in range(1, 7) for kind in kinds):
        raise CheckpointError(f"tokenizer.ggml.token_type is {shown(kinds)}; expected an integer of 1 to 6 per token")
    return [*kinds]


def _bpe_parts(metadata: Mapping[str, Any], tokens: list[str], pre: str) -> dict[str, Any]:
    """Return the parts of a tokenizer.json that only byte-level BPE has. Raises CheckpointError for damaged merges."""
    stored = _strings(metadata, "tokenizer.ggml.merges")
    try:
        check_vocabulary(len(tokens), len(stored))
    except ValueError as error:
        raise CheckpointError(f"tokenizer.ggml.merges is damaged: {error}") from error
    merges = [merge.split(" ") for merge in stored]
    if not all(len(merge) == 2 and all(merge) for merge in merges):
        raise CheckpointError("tokenizer.ggml.merges holds a merge that is not two tokens; the file is damaged")
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": _PRE_TOKENIZERS[pre],
        "post_processor": _BYTES | {"add_prefix_space": True, "trim_offsets": False},
        "decoder": _BYTES | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
            "ignore_merges": pre in _IGNORES_MERGES,
        },
    }


def _tokenizer(
    tokens: list[str], kinds: list[int], parts: dict[str, Any], bos: int | None, rstrip: bool
) -> dict[str, Any]:
    """Return a tokenizer.json. `bos` begins each text; `rstrip`: special tokens strip white space behind."""
    before = parts.get("post_processor")
    post_processor = before
    if bos is not None:
        first, pair = tokens[bos], list[dict[str, Any]]()
        for number, which in enumerate("AB"):
            pair += [{"SpecialToken": {"id": first, "type_id": number}}, {"Sequence": {"id": which, "type_id": number}}]
        template = {
            "type": "TemplateProcessing",
            "single": pair[:2],
            "pair": pair,
            "special_tokens": {first: {"id": first, "ids": [bos], "tokens": [first]}},
        }
        post_processor = {"type": "Sequence", "processors": [before, template]} if before else template
    flags = dict.fromkeys(("single_word", "lstrip", "normalized"), False)
    return parts | {
        "version": "1.0",
        "added_tokens": [
            {
                "id": index,
                "content": token,
                **flags,
                "rstrip": rstrip and token not in _KEEPS_SPACE,
                "special": kind != _USER_DEFINED,
            }
            for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ],
        "post_processor": post_processor,
    }


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
