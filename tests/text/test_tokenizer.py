"""Text in and out: incremental decoding, stop strings, texts far too long."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence, Strip
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from dash_export import DashRuntime
from dash_export.bundle.layout import TEXT_FILES
from dash_export.errors import BundleError, ContextLengthError, RequestError
from dash_export.runtime import results
from dash_export.serve.scheduler import Scheduler
from dash_export.serve.tickets import Request
from dash_export.text import tokenizer as text_module
from dash_export.text.tokenizer import Text, TextStream
from tests.models.helpers import tiny_tokenizer
from tests.serve.conftest import stream as scheduled

TOKENIZER = tiny_tokenizer()


def stream(text: str, *stop: str) -> tuple[list[str], bool]:
    """The pieces of a text whose tokens are single bytes, and whether a stop string ended it."""
    pieces, out = [], TextStream(TOKENIZER, stop)
    for token in TOKENIZER.encode(text).ids:
        pieces.append(out.push(token))
        if out.stopped:
            return pieces, True
    return [*pieces, out.finish()], False


@given(st.text(max_size=60))
def test_pieces_make_the_text(text: str) -> None:
    expected = TOKENIZER.decode(TOKENIZER.encode(text).ids)
    pieces, stopped = stream(text)
    assert "".join(pieces) == expected
    assert not stopped


def test_unicode_is_never_cut() -> None:
    """Four bytes, four tokens, one piece."""
    pieces, _ = stream("a☕é🙂")
    assert [piece for piece in pieces if piece] == ["a", "☕", "é", "🙂"]


def test_bytes_that_are_no_text_end_no_answer() -> None:
    """As SentencePiece writes them: a byte that stands alone, then one that nothing follows."""
    tokenizer = Tokenizer(
        BPE({"<0x0A>": 0, "<0xF0>": 1, "a": 2, "<unk>": 3}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = Sequence([ByteFallback(), Fuse()])
    out = TextStream(tokenizer)
    pieces = [out.push(token) for token in (2, 0, 1, 2, 2, 0, 2)]
    assert "".join([*pieces, out.finish()]) == "a\n\ufffdaa\na"


def sentence_pieces() -> Tokenizer:
    """Tokens "a", " it", " goes" as SentencePiece has them; a first token's space is not told."""
    tokenizer = Tokenizer(BPE({"a": 0, "▁it": 1, "▁goes": 2}, []))
    tokenizer.decoder = Sequence([Replace("▁", " "), ByteFallback(), Fuse(), Strip(" ", 1, 0)])
    return tokenizer


def test_a_text_that_goes_on_keeps_its_space() -> None:
    assert TextStream(sentence_pieces()).push(2) == "goes"
    assert TextStream(sentence_pieces(), after=1).push(2) == " goes"
    (*_, byte), (letter,) = TOKENIZER.encode("é").ids, TOKENIZER.encode("a").ids
    assert TextStream(TOKENIZER, after=byte).push(letter) == "a", "a part of a character is no text"


def test_only_a_chat_begins_a_text(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    after = list[int | None]()

    class Noted(TextStream):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            after.append(given[2])

    monkeypatch.setattr(results, "TextStream", Noted)
    session, scheduler = runtime.session("dense"), Scheduler(runtime, rows=1)
    session.generate([5, 7], 2)
    list(session.chat([{"role": "user", "content": "x"}], 2))
    list(runtime.batch(1).stream([[5, 8]], 2))
    scheduler.start()
    list(scheduled(scheduler, Request([5, 9], 2)))
    list(scheduled(scheduler, Request([5, 9], 2, continues=False)))
    scheduler.close()
    assert after == [7, None, 8, 9, None]


@given(st.text("ab<>é", max_size=30), st.text("ab<>é", min_size=1, max_size=5))
def test_stop_string_over_tokens(text: str, stop: str) -> None:
    pieces, stopped = stream(text, stop)
    assert stopped == (stop in text)
    assert "".join(pieces) == text.partition(stop)[0]


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    """And of two the earliest wins."""
    assert stream("x<en!<end>", "<end>")[0][:5] == ["x", "", "", "", "<en!"]
    assert stream("one two three", "three", "two") == (["o", "n", "e", " ", "", "", ""], True)


def test_what_is_read_is_what_a_bundle_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    read: set[str] = set()
    monkeypatch.setattr(text_module, "safe_path", lambda folder, name: read.add(name) or folder / name)
    Text(tmp_path)
    assert read == set(TEXT_FILES)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "tokenizer.json": lambda path: path.write_text("{ not json"),
    "generation_config.json": lambda path: path.write_text("[" * 100_000),
    "tokenizer_config.json": lambda path: path.symlink_to("/etc/passwd"),
    "chat_template.jinja": lambda path: path.write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_text_file(name: str, tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    DAMAGE[name](tmp_path / name)
    with pytest.raises(BundleError, match=name):
        Text(tmp_path)


def test_end_of_turn_ids(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    assert Text(tmp_path).eos_ids == {258}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert Text(tmp_path).eos_ids == {7, 9, 258}
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert Text(tmp_path).eos_ids == {7, 9, 258}
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7}')
    assert Text(tmp_path).eos_ids == {5, 258}
    (tmp_path / "chat_template.jinja").write_text("")
    with pytest.raises(RequestError, match="no chat template"):
        Text(tmp_path).chat([{"role": "user", "content": "Hi"}])


def test_how_training_batches_were_cut_and_filled_is_no_matter_here(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    plain = Text(tmp_path).encode("One day the ships sailed to port.")
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        "strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0,
        "pad_token": "x",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert Text(tmp_path).encode("One day the ships sailed to port.") == plain


def test_a_template_has_every_special_token_by_name(tmp_path: Path) -> None:
    """As transformers gives them."""
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ sep_token }}{{ pad_token }}")
    plain = {"sep_token": "<|im_end|>"}
    for config in (
        plain,
        {"sep_token": {"content": "<|im_end|>", "special": True}},
        {"extra_special_tokens": plain},
        {"model_specific_special_tokens": plain},
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        text = Text(tmp_path)
        assert text.tokenizer.decode(text.chat([{"role": "user", "content": "hi"}]), False) == "hi<|im_end|>"


def test_prompts_far_too_long_are_not_encoded(tiny_runtime: Callable[..., DashRuntime]) -> None:
    """In a session and in a batch, of text and of messages: by what is free, or by the whole context."""
    runtime = tiny_runtime()
    session, batch, long = runtime.session(), runtime.batch(2), "x" * 3_000_000
    session.prefill([1] * 12)
    asked: list[tuple[Callable[[], object], int]] = [
        (lambda: session.generate(long), 500),
        (lambda: session.prefill(long), 500),
        (lambda: session.chat([{"role": "user", "content": long}]), 512),
        (lambda: session.score(long), 512),
        (lambda: batch.checked(long), 512),
    ]
    start = time.process_time()
    for ask, limit in asked:
        with pytest.raises(ContextLengthError, match=rf"3\d+ letters are far over the {limit} tokens"):
            ask()
    assert time.process_time() - start < 1
    assert len(runtime.text.encode("a" * 100_000)) == 100_000, "no limit for texts that are scored in windows"


def test_a_decoder_that_panics_ends_its_answer_only() -> None:
    """A panic of native code is no Exception, and would end a whole batch."""
    data = json.loads(TOKENIZER.to_str())
    data["decoder"] = {"type": "Strip", "content": "a", "start": 5, "stop": 5}
    (token,) = TOKENIZER.encode("a").ids
    with pytest.raises(RequestError, match="cannot write this token"):
        TextStream(Tokenizer.from_str(json.dumps(data))).push(token)
    with pytest.raises(RequestError, match="cannot write this token"):
        TextStream(Tokenizer.from_str(json.dumps(data)), after=token)


@pytest.mark.parametrize("text", ["", "short", "one line\nand\nmany more\n" * 9, "a b c d e f g h " * 20, "x" * 300])
def test_a_long_text_is_encoded_in_pieces(text: str, tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_PIECE", 40)
    read = Text(tiny_root)
    assert read.encode_in_pieces(text).tolist() == read.encode(text)


def test_windows_begin_as_a_fresh_text_does(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    said = "abcdefgh" * 9
    plain = Text(tmp_path)
    assert [len(window) for window in plain.windows(said, 4, 9)] == [9] * 4
    assert plain.beginning.tolist() == []
    tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 257)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = Text(tmp_path)
    own = [window[:-1] for window in plain.windows(said, 99, 9)]
    found = text.windows(said, 99, 9)
    assert [window[0] for window in found] == [257] * len(found)
    assert all(len(window) == 9 for window in found)
    assert len(found) == len(said) // 8
    assert [*found[0][1:]] == [*own[0]]
    assert 257 not in np.concatenate([window[1:] for window in found])
    assert plain.windows(said, 1, 73) == []
    assert text.windows(said, 1, 1) == []
