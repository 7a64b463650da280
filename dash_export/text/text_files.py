"""Text that a user gives (to learn from, to measure on, to answer), and tokenizers, checked before native code runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dash_export.errors import RequestError
from dash_export.files.artifacts import read_bounded

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_BYTES = 1 << 30
MAX_TEXT_BYTES = 64 << 20
"""Bytes of a file that comes with a model: the largest published tokenizer.json is about 35 MB."""
MAX_GROWTH, MAX_BEGINNING = 40, 32
"""Bounds of how much longer a tokenizer makes a text (published ones: 32 at most) and of its template's own tokens."""
MAX_TOKEN = 4096
"""Letters of a token, a replacement, a prefix: published ones have 128."""
MAX_WORD, MAX_PREFIX = 1 << 8, 16
"""Letters of a word that WordPiece looks into (published: 100, 200) and of what begins its pieces inside a word."""
MAX_ADDED = 1 << 20
"""Letters of all added tokens, normalized where they say so: native code makes an automaton of them."""
MAX_REPEATS = 256
"""A pattern's counted repetitions, multiplied: native code tries them all at each letter. Published ones have 3."""
MAX_TOKENS, MAX_MERGES = 1 << 19, 2.5
"""Size of a vocabulary, and merges per token: native code takes a kilobyte for each. Published: 262,144 and 2.3."""
MAX_PARTS = 32
"""Bound of the parts in a chain of normalizers, decoders or the like: published chains have 7."""
_GROWS = {"Metaspace": 2, "Lowercase": 3, "NFC": 3, "BertProcessing": 3, "RobertaProcessing": 3}
_GROWS |= dict.fromkeys(("ByteLevel", "NFD", "NFKC", "NFKD", "BertNormalizer"), 4)
"""Kind of part -> letters that it can make of one letter. The other known kinds add a few at most."""
_KINDS = {
    *("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "Strip", "StripAccents", "Replace", "Prepend"),
    *("BertNormalizer", "ByteLevel", "Metaspace", "Split", "Digits", "Whitespace", "WhitespaceSplit", "Punctuation"),
    *("BertPreTokenizer", "CharDelimiterSplit", "UnicodeScripts", "FixedLength", "TemplateProcessing"),
    *("BertProcessing", "RobertaProcessing", "ByteFallback", "Fuse", "BPEDecoder", "CTC", "WordPiece"),
}
_COUNTED = re.compile(r"\{(\d*),?(\d*)\}")


def bounded_text(path: Path, limit: int) -> str:
    """Read a regular UTF-8 file of at most `limit` bytes, line ends as `\\n`. Raises OSError and UnicodeDecodeError."""
    return read_bounded(path, limit).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def load_tokenizer(text: str) -> Tokenizer:
    """Load the tokenizer of a `tokenizer.json`. Raises ValueError for a text that is none, and for a tokenizer that
    makes a text so long that a prompt of some letters fills the memory.
    """
    from tokenizers import Tokenizer  # here: not every reader of a text needs it

    try:
        data = json.loads(text)
        _check_texts(data)
        _check_growth(data)
        if "type" not in data["model"]:  # an old file; native code would try every kind
            text = json.dumps(data | {"model": data["model"] | {"type": "BPE"}})
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    try:
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        begins = tokenizer.encode("").ids
    except BaseException as error:  # tokenizers' panics are no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise ValueError(f"{error!s:.300}") from error
    if any(tokenizer.id_to_token(index) is None for index in begins):
        raise ValueError("its template adds a token that it does not have")
    return tokenizer


def lines(text: str) -> Iterator[str]:
    """Return the lines of a text, with only one of them in memory; other line ends than "\\n" are letters."""
    return (line[0] for line in re.finditer("(?m)^.*$", text))


def check_vocabulary(tokens: int, merges: int) -> None:
    """Raise ValueError for over MAX_TOKENS tokens, or over MAX_MERGES merges per token."""
    if tokens > MAX_TOKENS or merges > MAX_MERGES * tokens:
        raise ValueError(f"it has {merges} merges for {tokens} tokens (at most {MAX_MERGES} for each of {MAX_TOKENS})")


def _check_texts(data: Any) -> None:
    """Check the model's kind, vocabulary, patterns and texts before native code reads any of it. Raises ValueError."""
    model = data.get("model") if isinstance(data, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") not in ("BPE", "WordPiece"):
        # Native code of other models recurses and multiplies as far as a stranger's vocabulary says.
        raise ValueError("its model is neither BPE nor WordPiece, which is what can be read")
    vocab, merges = model.get("vocab"), model.get("merges")
    if model.get("type") == "WordPiece":
        merges, longest, prefix = [], model.get("max_input_chars_per_word"), model.get("continuing_subword_prefix")
        if type(longest) is not int or not 0 <= longest <= MAX_WORD:  # native code tries every piece of a word
            raise ValueError(f"its max_input_chars_per_word is no number up to {MAX_WORD}")
        if not isinstance(prefix, str) or len(prefix) > MAX_PREFIX:  # and copies this each time
            raise ValueError(f"its continuing_subword_prefix is no text of up to {MAX_PREFIX} letters")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError("its model has no vocab and merges")
    check_vocabulary(len(vocab), len(merges))
    left = [data]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            if isinstance(pattern := part.get("Regex"), str) and _repeats(pattern) > MAX_REPEATS:
                raise ValueError(f"it has a pattern that repeats over {MAX_REPEATS} times")
            left += (*part, *part.values())
        elif isinstance(part, list):
            left += part
        elif isinstance(part, str) and len(part) > MAX_TOKEN:
            raise ValueError(f"it has a text of over {MAX_TOKEN} letters in it")


def _repeats(pattern: str) -> int:
    return math.prod(max(1, *(int(count[:9] or 0) for count in counts)) for counts in _COUNTED.findall(pattern))


def _check_growth(data: Any) -> None:
    """Raise ValueError where the declared parts make a text too long. No native code runs before (loading does)."""
    chains = {("normalizer", "pre_tokenizer"): MAX_GROWTH, ("decoder",): MAX_GROWTH, ("post_processor",): MAX_BEGINNING}
    try:
        for names, most in chains.items():
            parts = [part for name in names for part in _parts(data.get(name))]
            if len(parts) > MAX_PARTS:
                raise ValueError(f"its {names[0]} has over {MAX_PARTS} parts")
            within = _in_bytes(data["model"]) if "normalizer" in names else 1
            if within * math.prod(map(_growth, parts)) > most:
                raise ValueError(f"what it does to a text can make it over {most} times as long")
        normalized = math.prod(map(_growth, _parts(data.get("normalizer"))))
        added = [token for token in data.get("added_tokens") or () if isinstance(token.get("content"), str)]
        longer = (len(token["content"]) * (normalized if token.get("normalized", True) else 1) for token in added)
        if sum(longer) > MAX_ADDED:
            raise ValueError(f"its added tokens have over {MAX_ADDED} letters")
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"it is no tokenizer.json ({error!r:.100})") from error


def _in_bytes(model: dict[str, Any]) -> int:
    """Return the byte tokens that a letter unknown to the model can become, per byte of it: affixes fall back, too."""
    affixes = [model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix")]
    return 1 + len("".join(affixes).encode("utf-8", "replace")) if model.get("byte_fallback") else 1


def _parts(given: Any) -> list[dict[str, Any]]:
    """Return the parts of a normalizer, pre-tokenizer, decoder or post-processor in order, sequences flattened."""
    if given is None:
        return []
    if given["type"] == "Sequence":
        if len(given) != 2:
            raise ValueError("a sequence in it holds more than its parts")
        return [part for name in given if name != "type" for inner in given[name] for part in _parts(inner)]
    if given["type"] not in _KINDS:  # native code reads parts without a type it knows, too, by what they hold
        raise ValueError(f"it has a part of the type {given['type']!r:.60}, which is not known")
    return [given]


def _growth(part: dict[str, Any]) -> float:
    """Return how many times as long one part can make a text."""
    kind = part["type"]
    if kind == "Replace":
        pattern, content = part["pattern"], len(part["content"])
        return max(1.0, content / len(pattern["String"])) if pattern.get("String") else 1.0 + content
    if kind == "TemplateProcessing":
        made_of = {name: len(token["ids"]) for name, token in part["special_tokens"].items()}
        pieces = [*part["single"], *part["pair"]]
        special = sum(made_of.get(piece["SpecialToken"]["id"], 1) for piece in pieces if "SpecialToken" in piece)
        return max(1, special, sum("Sequence" in piece for piece in part["single"]))
    if kind == "Prepend":
        return 1.0 + len(part["prepend"])
    if {"CTC": part.get("word_delimiter_token"), "BPEDecoder": part.get("suffix")}.get(kind) == "":
        return 2.0  # a space between all letters
    return _GROWS.get(kind, 1)


def read_stream(stream: TextIO, limit: int = 1 << 26) -> str:
    """Read at most `limit` characters of a pipe or standard input. Raises RequestError for more, and for no text."""
    try:
        text = stream.read(limit + 1)
    except UnicodeDecodeError as error:
        raise RequestError(f"What comes in is not {error.encoding} text (byte {error.start}).") from error
    if len(text) > limit:
        raise RequestError(f"What comes in has over {limit} characters: give less at a time, or a file.")
    return text.removeprefix("\ufeff")


def read_text(path: Path, *, pipe: bool = False) -> str:
    """Read a UTF-8 text file of at most MAX_BYTES; with `pipe` also a pipe, as of `<(command)`. Raises RequestError."""
    try:
        if pipe and path.is_fifo():
            with path.open(encoding="utf-8") as stream:
                return read_stream(stream)
        return bounded_text(path, MAX_BYTES)
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise RequestError(f"There is no text file {path}.") from error
    except (OSError, ValueError) as error:  # a NUL byte in the name
        raise RequestError(f"{path} cannot be read: {getattr(error, 'strerror', error)}.") from error
