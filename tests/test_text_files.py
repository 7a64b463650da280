"""Texts from outside, and the tokenizers that read them."""

from __future__ import annotations

import io
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dash_export.errors import CheckpointError, RequestError
from dash_export.models import open_checkpoint
from dash_export.text_files import load_tokenizer, read_stream, read_text


def replacing(content: str, pattern: dict[str, str]) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


GROWING = {
    "five replacements": [replacing("a" * 100, {"String": "a"})] * 5,
    "a pattern that is nowhere": [replacing("a" * 300, {"Regex": ""})],
    "a table": [{"type": "Precompiled", "precompiled_charsmap": ""}],
}
GROWING["repetitions of repetitions"] = [replacing("", {"Regex": r"[\s\S]{0,180}" * 3 + r"(?!\w|\W|$)"})]
USUAL = {
    "llama": [{"type": "Prepend", "prepend": "\u2581"}, replacing("\u2581", {"String": " "})],
    "spaces": [replacing(" ", {"Regex": " {2,}"}), {"type": "NFKC"}],
}


@pytest.mark.parametrize("where", ["normalizer", "decoder"])
@pytest.mark.parametrize("name", [*GROWING, *USUAL])
def test_tokenizers_that_make_texts_grow(name: str, where: str, tiny_root: Path) -> None:
    data = json.loads((tiny_root / "tokenizer.json").read_text())
    parts = (GROWING | USUAL)[name]
    if where == "decoder":
        parts = [part for part in parts if part["type"] == "Replace"]
    data[where] = {"type": "Sequence", f"{where}s": parts}
    if name in GROWING and parts:
        with pytest.raises(ValueError, match=r"times|Precompiled|letters"):
            load_tokenizer(json.dumps(data))
    else:
        load_tokenizer(json.dumps(data))


def test_a_pattern_that_hangs_the_pre_tokenizer(tiny_root: Path) -> None:
    data = json.loads((tiny_root / "tokenizer.json").read_text())
    for pattern, sound in ((r"[\s\S]{0,180}" * 3 + r"(?!\w|\W|$)", False), (r"\p{N}{1,3}| {2,}|a", True)):
        data["pre_tokenizer"] = {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        if sound:
            load_tokenizer(json.dumps(data))
        else:
            with pytest.raises(ValueError, match="a pattern that repeats over 256 times"):
                load_tokenizer(json.dumps(data))


@pytest.mark.parametrize("kind", ["single", "pair"])
def test_a_template_that_adds_too_much(kind: str, tiny_root: Path) -> None:
    data = json.loads((tiny_root / "tokenizer.json").read_text())
    token = {"id": "x", "ids": [1] * 100, "tokens": ["a"] * 100}
    pieces = {"single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "B", "type_id": 0}}]}
    for times, sound in ((1, True), (50, False)):
        made = pieces | {kind: pieces[kind] + [{"SpecialToken": {"id": "x", "type_id": 0}}] * times}
        data["post_processor"] = {"type": "TemplateProcessing", **made, "special_tokens": {"x": token}}
        if sound:
            load_tokenizer(json.dumps(data))
        else:
            with pytest.raises(ValueError, match="times as long"):
                load_tokenizer(json.dumps(data))


def test_the_check_of_a_tokenizer_takes_no_time_itself(tiny_root: Path) -> None:
    """And takes numbers for numbers, and what a key is called by its letters, however they are written."""
    data = json.loads((tiny_root / "tokenizer.json").read_text())
    unused = {"id": "x", "ids": [1] * 4000, "tokens": ["a"] * 4000}
    template = {"single": [], "pair": [], "special_tokens": {"x": unused}}
    load_tokenizer(json.dumps(data | {"post_processor": {"type": "TemplateProcessing", **template}}))
    quotes = [{"id": number, "content": '"' * 4000} for number in range(120)]
    began = time.perf_counter()
    with suppress(ValueError):
        load_tokenizer(json.dumps(data | {"added_tokens": quotes}))
    assert time.perf_counter() - began < 2
    with pytest.raises(ValueError, match="added tokens have over"):
        load_tokenizer(json.dumps(data | {"added_tokens": [{"id": 1, "content": "a" * 3600}] * 4000}))
    with pytest.raises(ValueError, match="not BPE"):
        load_tokenizer('{"model": {"type": "\\u0055nigram"}}')


def test_a_model_whose_tokenizer_is_none(tiny_root: Path, tmp_path: Path) -> None:
    """Told when it is exported, not when the bundle is run."""
    for path in (tiny_root.parent / "model").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Unknown"}}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer that can be used"):
        open_checkpoint(tmp_path)


def test_endless_input_is_refused() -> None:
    assert read_stream(io.StringIO("12345"), 5) == "12345"
    with pytest.raises(RequestError, match="over 4 characters"):
        read_stream(io.StringIO("12345"), 4)


def test_a_byte_order_mark_is_no_letter(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello\r\n")
    assert read_text(tmp_path / "a.txt") == "hello\n"
