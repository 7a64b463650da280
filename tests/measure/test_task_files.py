"""Task files: the forms that are read, and the line every error names."""

import json
from pathlib import Path

import pytest

from dash_export.errors import RequestError
from dash_export.measure.tasks import Answer, Question, read_items

QUESTION = {"query": "Two and two?", "choices": ["four", "five"], "gold": 0}


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_forms(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    assert read_items(written(path, QUESTION | {"id": 7, "subject": "sums"})) == [
        Question(1, "Two and two?", ("four", "five"), 0)
    ]
    assert len(read_items(written(path, QUESTION, QUESTION, "not JSON"), 2)) == 2
    assert read_items(written(path, "", {"context": "a b", "target": " c"})) == [Answer(2, "a b", " c")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nonsense", "is not JSON"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "is not JSON"),
        ({"question": "?"}, "none of the known forms"),
        (QUESTION | {"gold": 2}, "0 to 1"),
        (QUESTION | {"gold": True}, "'gold'"),
        (QUESTION | {"gold": "0"}, "'gold'"),
        (QUESTION | {"choices": ["one"]}, "2 to 256"),
        (QUESTION | {"choices": ["one", 2]}, r"choices\[1\]"),
        (QUESTION | {"query": " "}, "'query'"),
        ({"context": "a"}, "'target'"),
        ({"context": None, "target": "b"}, "'context'"),
        ('{"context": "\\ud800", "target": "b"}', "half a character"),
        ({"context": "another", "target": "form"}, "another form than line 1"),
        ("x" * (1 << 20 | 1), "characters long"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, line: object, says: str) -> None:
    path = written(tmp_path / "t.jsonl", QUESTION, line)
    with pytest.raises(RequestError, match=says) as caught:
        read_items(path)
    assert f"{path}:2" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    written(tmp_path / "e.jsonl", "")
    for name, says in (("none.jsonl", "no text file"), (".", "no text file"), ("e.jsonl", "empty"), ("b.jsonl", "UTF")):
        with pytest.raises(RequestError, match=says):
            read_items(tmp_path / name)
