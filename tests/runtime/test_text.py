"""Text in and out: incremental decoding, stop strings, texts far too long."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Sequence
from tokenizers.models import BPE

from dash_export import DashRuntime
from dash_export.bundle import TEXT_FILES
from dash_export.errors import BundleError, ContextLengthError, RequestError
from dash_export.runtime import text as text_module
from dash_export.runtime.text import Text, TextStream
from tests.models.helpers import tiny_tokenizer

MESSAGES = [{"role": "user", "content": "Hi"}]
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


@given(st.text("ab<>é", max_size=30), st.text("ab<>é", min_size=1, max_size=5))
def test_stop_string_over_tokens(text: str, stop: str) -> None:
    pieces, stopped = stream(text, stop)
    assert stopped == (stop in text)
    assert "".join(pieces) == text.partition(stop)[0]


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    out = TextStream(TOKENIZER, ("<end>",))
    pieces = [out.push(token) for token in TOKENIZER.encode("x<en!<end>").ids]
    assert pieces[:5] == ["x", "", "", "", "<en!"]
    assert out.stopped


def test_the_earliest_of_two_stop_strings_wins() -> None:
    assert stream("one two three", "three", "two") == (["o", "n", "e", " ", "", "", ""], True)


def test_what_is_read_is_what_a_bundle_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    read: set[str] = set()
    monkeypatch.setattr(text_module, "safe_path", lambda folder, name: read.add(name) or folder / name)
    Text(tmp_path)
    assert read == set(TEXT_FILES)


def test_bundle_without_template(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(RequestError, match="no chat template"):
        Text(tmp_path).chat(MESSAGES)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_damaged_text_file(name: str, tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text("{ not json")
    with pytest.raises(BundleError, match=name):
        Text(tmp_path)


def test_end_of_turn_ids(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    assert Text(tmp_path).eos_ids == {258}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert Text(tmp_path).eos_ids == {7, 9}


def test_how_training_batches_were_cut_and_filled_is_no_matter_here(tiny_root: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(tiny_root / name, tmp_path)
    plain = Text(tmp_path).encode("One day the ships sailed to port.")
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0,
        "pad_token": "x",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert Text(tmp_path).encode("One day the ships sailed to port.") == plain


def test_files_that_are_no_text_or_lie_elsewhere(tiny_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    shutil.copy(tiny_root / "tokenizer.json", folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="cannot be read"):
        Text(folder)
    (folder / "chat_template.jinja").unlink()
    (tmp_path / "secret").write_text("mine")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(BundleError):
        Text(folder)


@pytest.fixture
def encoded(tmp_path: Path) -> tuple[Text, list[int]]:
    """A text of a tokenizer for which 64 spaces are one token, and the lengths of what that has been given."""
    spaces = [" " * 2**power for power in range(7)]
    vocabulary = {token: index for index, token in enumerate([*spaces, "a"])}
    Tokenizer(BPE(vocabulary, [(token, token) for token in spaces[:-1]])).save(str(tmp_path / "tokenizer.json"))
    text, given = Text(tmp_path), []

    class Counted:
        def __init__(self, tokenizer: Tokenizer) -> None:
            self.encode = lambda part, **options: given.append(len(part)) or tokenizer.encode(part, **options)

    text.tokenizer = Counted(text.tokenizer)  # type: ignore[assignment]
    return text, given


def test_text_far_too_long_is_not_encoded(encoded: tuple[Text, list[int]]) -> None:
    text, given = encoded
    with pytest.raises(ContextLengthError, match="over 2048 prompt tokens, but 1024 positions are free"):
        text.encode("a" * 3_000_000, limit=1024)
    assert given == [16 * 1024]
    del given[:]
    with pytest.raises(ContextLengthError):  # nor where it begins with what may fit
        text.encode(" " * 100_000 + "a" * 3_000_000, limit=1024)
    assert sum(given) < 500_000
    with pytest.raises(ContextLengthError):
        text.encode("a" * 5000, limit=0)


def test_text_that_fits_is_encoded(encoded: tuple[Text, list[int]]) -> None:
    """However many characters it has; and without a limit (texts that are scored in windows) any is."""
    text, _ = encoded
    assert text.encode(" " * 64 * 1024, limit=1024) == [6] * 1024
    assert text.encode(" " * 64 * 1000 + "a" * 24, limit=1024) == [6] * 1000 + [7] * 24
    for length in (1, 4096, 4097, 8192):
        assert text.encode("a" * length, limit=length) == [7] * length
        assert text.encode(" " * length, limit=max(1, length // 64)) == text.encode(" " * length)
    assert len(text.encode("a" * 100_000)) == 100_000


def test_prompts_far_too_long(tiny_runtime: Callable[..., DashRuntime]) -> None:
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
    for ask, limit in asked:
        with pytest.raises(ContextLengthError, match=f"over {2 * limit} prompt tokens"):
            ask()


def test_a_decoder_that_panics_ends_its_answer_only(tiny_root: Path, tmp_path: Path) -> None:
    """A panic of native code is no Exception, and would end a whole batch."""
    folder = Path(shutil.copytree(tiny_root, tmp_path / "a.dash", ignore=shutil.ignore_patterns("onnx", "engines")))
    data = json.loads((folder / "tokenizer.json").read_text())
    data["decoder"] = {"type": "Strip", "content": "a", "start": 5, "stop": 5}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    text = Text(folder)
    (token,) = TOKENIZER.encode("a").ids
    with pytest.raises(RequestError, match="cannot write what these tokens say"):
        text.decode([token])
    with pytest.raises(RequestError, match="cannot write what this token says"):
        TextStream(text.tokenizer).push(token)


@pytest.mark.parametrize("text", ["", "short", "one line\nand\nmany more\n" * 9, "a b c d e f g h " * 20, "x" * 300])
def test_a_long_text_is_encoded_in_pieces(text: str, tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_PIECE", 40)
    read = Text(tiny_root)
    assert read.encode_in_pieces(text).tolist() == read.encode(text)
