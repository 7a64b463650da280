"""Texts from outside, and the tokenizers that read them."""

import io
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dash_export.errors import RequestError
from dash_export.text.text_files import load_tokenizer, read_stream, read_text


def replacing(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(where: str, *parts: dict[str, Any], name: str = "") -> dict[str, Any]:
    return {where: {"type": "Sequence", name or f"{where}s": list(parts)}}


def split(pattern: str) -> dict[str, Any]:
    options = {"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": {"type": "Split", **options}}


def template(kind: str, times: int, unused: int = 0) -> dict[str, Any]:
    """A template that adds a token of 100 ids so many times."""
    pieces: dict[str, list[Any]] = {"single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": []}
    pieces[kind] += [{"SpecialToken": {"id": "x", "type_id": 0}}] * times
    count = unused or 100
    token = {"id": "x", "ids": [1] * count, "tokens": ["a"] * count}
    return {"post_processor": {"type": "TemplateProcessing", **pieces, "special_tokens": {"x": token}}}


LONGER = replacing("a" * 100, String="a")
APART = {"type": "CTC", "pad_token": "z", "word_delimiter_token": "", "cleanup": True}
FALLBACK = {"type": "BPE", "vocab": {}, "merges": [], "byte_fallback": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
HANGS = r"[\s\S]{0,180}" * 3 + r"(?!\w|\W|$)"
PRECOMPILED = {"type": "Precompiled", "precompiled_charsmap": ""}
PIECES = {"type": "WordPiece", "unk_token": "u", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
          "vocab": {"u": 0}}  # fmt: skip
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "normalizer, five replacements": (sequence("normalizer", *[LONGER] * 5), "times as long"),
    "decoder, five replacements": (sequence("decoder", *[LONGER] * 5), "times as long"),
    "bytes of bytes, normalizer": (sequence("normalizer", *[BYTES] * 5), "times as long"),
    "bytes of bytes, pre_tokenizer": (sequence("pre_tokenizer", *[BYTES] * 5, name="pretokenizers"), "times as long"),
    "nothing, replaced": (sequence("normalizer", *[replacing("a", String="")] * 9), "times as long"),
    "letters apart": (sequence("decoder", *[{"type": "BPEDecoder", "suffix": ""}] * 3, *[APART] * 3), "times as long"),
    "many parts": (sequence("pre_tokenizer", *[{"type": "Digits"}] * 99, name="pretokenizers"), "over 32 parts"),
    "a part of no known type": ({"normalizer": {"type": "Foo", "normalizers": []}}, "type 'Foo', which is not known"),
    "no part": ({"normalizer": {"kind": "NFC"}}, "no tokenizer.json"),
    "a pattern that is nowhere": (sequence("normalizer", replacing("a" * 300, Regex="")), "times as long"),
    "a table": (sequence("normalizer", PRECOMPILED), "Precompiled"),
    "repetitions of repetitions": (sequence("decoder", replacing("", Regex=HANGS)), "repeats over 256 times"),
    "a pre-tokenizer's": (split(HANGS), "repeats over 256 times"),
    "single": (template("single", 50), "times as long"),
    "pair": (template("pair", 50), "times as long"),
    "added tokens": ({"added_tokens": [{"id": 1, "content": "a" * 3600}] * 4000}, "added tokens have over"),
    "added tokens, normalized": (
        sequence("normalizer", replacing("b" * 9, String="a"))
        | {"added_tokens": [{"id": 1, "content": "a" * 4000, "normalized": True}] * 30},
        "added tokens have over",
    ),
    "a long word": ({"model": PIECES | {"max_input_chars_per_word": 1 << 30}}, "max_input_chars_per_word is no"),
    "a long prefix": ({"model": PIECES | {"continuing_subword_prefix": "#" * 99}}, "continuing_subword_prefix is no"),
    "merges": ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]] * 9}}, "9 merges for 1 tokens"),
    "a long token": ({"added_tokens": [{"id": 1, "content": "a" * 5000}]}, "a text of over 4096 letters"),
    "another model, in other letters": ({"model": {"type": "Unigram"}}, "neither BPE"),
    "another model, that does not say so": ({"model": {"unk_id": 0, "vocab": [["u", -1.0]]}}, "no vocab and merges"),
    "another model, with merges": (
        {"model": {"unk_token": "u", "max_input_chars_per_word": 9, "vocab": {"u": 0}, "merges": [["a"]]}},
        "data did not match|invalid|expected",
    ),
    "a prefix in bytes": ({"model": FALLBACK | {"continuing_subword_prefix": "\u2581" * 20}}, "times as long"),
    "a suffix in bytes": ({"model": FALLBACK | {"end_of_word_suffix": "\u2581" * 20}}, "times as long"),
}
USUAL: dict[str, dict[str, Any]] = {
    "WordPiece": {"model": PIECES, "added_tokens": [], "post_processor": None},
    "llama": sequence("normalizer", {"type": "Prepend", "prepend": "\u2581"}, replacing("\u2581", String=" ")),
    "spaces": sequence("normalizer", replacing(" ", Regex=" {2,}"), {"type": "NFKC"}),
    "a decoder": sequence("decoder", replacing(" ", String="\u2581")),
    "numbers": split(r"\p{N}{1,3}| {2,}|a"),
    "one token": template("single", 1, 30),
    "an unused token": template("single", 0, unused=4000),
    "an old file": {"added_tokens": [], "model": {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}},
}


@pytest.mark.parametrize("name", [*HOSTILE, *USUAL])
def test_tokenizers_made_to_harm(name: str, tiny_root: Path) -> None:
    """They make a text grow, hang, or fill the memory."""
    data = json.loads((tiny_root / "tokenizer.json").read_text())
    if name in USUAL:
        load_tokenizer(json.dumps(data | USUAL[name]))
        return
    change, said = HOSTILE[name]
    with pytest.raises(ValueError, match=said):
        load_tokenizer(json.dumps(data | change).replace("Unigram", "\\u0055nigram"))


def test_the_check_of_a_tokenizer_takes_no_time_itself(tiny_root: Path) -> None:
    data = json.loads((tiny_root / "tokenizer.json").read_text())
    quotes = [{"id": number, "content": '"' * 4000} for number in range(120)]
    began = time.perf_counter()
    with suppress(ValueError):
        load_tokenizer(json.dumps(data | {"added_tokens": quotes}))
    assert time.perf_counter() - began < 2


def test_endless_input_is_refused() -> None:
    assert read_stream(io.StringIO("12345"), 5) == "12345"
    assert read_stream(io.StringIO("\ufeff123"), 5) == "123", "as in a file"
    with pytest.raises(RequestError, match="over 4 characters"):
        read_stream(io.StringIO("12345"), 4)


def test_a_byte_order_mark_is_no_letter(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello\r\n")
    assert read_text(tmp_path / "a.txt") == "hello\n"
