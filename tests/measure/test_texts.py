"""What is judged: windows of a text, and the model's own answers."""

import json
from pathlib import Path

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.bundle.layout import ANSWERS
from dash_export.errors import RequestError
from dash_export.measure.texts import judged_text, windows
from dash_export.text.chats import DIAL_ANSWERS
from tests.tiny import TEXT

WINDOW = 48


def test_windows(runtime: DashRuntime) -> None:
    ids = runtime.text.encode(TEXT)
    parts = windows(runtime, TEXT, "t", 3, WINDOW)
    assert parts[0].tolist() == ids[:WINDOW]
    assert parts[-1].tolist() == ids[-WINDOW:]
    assert len(windows(runtime, TEXT, "t", 10**6, WINDOW)) == len(ids) // WINDOW, "they do not overlap"
    with pytest.raises(RequestError, match="less than one window of 256"):
        windows(runtime, "too short", "t", 4, 256)
    with pytest.raises(RequestError, match="context of 512"):
        windows(runtime, TEXT, "t", 4, 513)
    with pytest.raises(RequestError, match="dense prefix of 47"):
        windows(runtime, TEXT, "t", 1, WINDOW, 47)


def chats(path: Path, *answers: str | None) -> Path:
    """One prompt per answer; None is for the model to write."""
    records = [
        {"prompt": f"Tell me of {place}."} | ({} if answer is None else {"answer": answer})
        for place, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_answers_that_are_given_and_answers_that_are_not(runtime: DashRuntime, tmp_path: Path) -> None:
    """The dense mode writes the latter; the prompt is dense in both."""
    given = "It is a long story, and nobody knows how it ends."
    text = judged_text(runtime, chats(tmp_path / "mine.jsonl", given, None, "x"), window=12)
    prompts = [runtime.text.chat([{"role": "user", "content": f"Tell me of {place}."}]) for place in range(2)]
    written = runtime.session("dense").generate(np.array(prompts[1]), 12).tokens
    assert text.name == "mine.jsonl"
    assert [item.prefix for item in text.items] == [len(prompt) for prompt in prompts], "a token has no successor"
    assert text.items[0].ids.tolist() == [*prompts[0], *runtime.text.encode(given, special=False)[:12]]
    assert text.items[1].ids.tolist() == [*prompts[1], *written]


def test_without_a_file_the_bundles_answers_that_set_no_dial(runtime: DashRuntime) -> None:
    own = runtime.bundle.root / ANSWERS
    assert judged_text(runtime, None, limit=1).name == "prose.txt"
    try:
        chats(own, *(f"The answer has the number {place}." for place in range(2 * DIAL_ANSWERS + 1)))
        items = judged_text(runtime, None).items
        ends = [runtime.text.decode(item.ids[item.prefix :].tolist())[-4:] for item in items]
        assert ends == [f" {place}." for place in range(DIAL_ANSWERS, 2 * DIAL_ANSWERS + 1)]
        assert len(judged_text(runtime, None, limit=3).items) == 3
    finally:
        own.unlink()


@pytest.mark.parametrize(("answers", "said"), [(("x",), "no answer of two tokens"), ((), "has no prompts")])
def test_answers_that_cannot_serve(runtime: DashRuntime, tmp_path: Path, answers: tuple[str, ...], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        judged_text(runtime, chats(tmp_path / "mine.jsonl", *answers))


def test_stretches_repeat_what_is_short(runtime: DashRuntime, tmp_path: Path) -> None:
    text = judged_text(runtime, chats(tmp_path / "mine.jsonl", "It is a long story.", "It is a short one."))
    ids = np.concatenate([item.ids for item in text.items])
    parts = text.stretches(3, len(ids) + 10)
    assert [len(part) for part in parts] == [len(ids) + 10] * 3
    np.testing.assert_array_equal(parts[0], [*ids, *ids[:10]])
    assert [part[0] for part in text.stretches(2, 4)] == [ids[0], ids[-4]]
