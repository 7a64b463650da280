"""Texts from outside, and the tokenizers that read them."""

from __future__ import annotations

import io
import json
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
        with pytest.raises(ValueError, match=r"times as long|Precompiled|letters"):
            load_tokenizer(json.dumps(data))
    else:
        load_tokenizer(json.dumps(data))


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
