"""`eval` and `frontier`."""

import json
import sys
from contextlib import suppress
from pathlib import Path
from unittest.mock import MagicMock, Mock

import pytest

from dash_export.bundle.layout import REPORT
from dash_export.files.outputs import locked
from tests.commands.helpers import dash, done, refused
from tests.measure.test_tasks import ANSWERS, CHOICES, QUESTIONS, write_task

TARGET = ("--target", "cpu-fp32")
SMALL = ("--window", 48, "--prefix", 10, "--limit", 2)


def test_eval_json(tiny_root: Path, text: Path, tmp_path: Path) -> None:
    write_task(tmp_path, "own_choices", QUESTIONS, CHOICES)
    write_task(tmp_path, "own_answers", [{"context": "The layers of a decoder are", "target": " not"}], ANSWERS)
    options = ["--tasks", "own_choices,own_answers", "--include-path", tmp_path]
    options += ["--also", f"{tiny_root}:portable", "--skipped", "1,2"]
    result = done("eval", tiny_root, *TARGET, *SMALL, "--text", text, *options, "--json")
    report = json.loads(result.stdout)
    assert [(file["file"], file["form"]) for file in report["files"]] == [
        ("own.txt", "text"), ("own_choices", "task"), ("own_answers", "task"),
    ]  # fmt: skip
    assert [file["results"][0]["items"] for file in report["files"]] == [2, 2, 1]
    kinds = ("static", "token")
    for file in report["files"]:
        settings = [row["setting"] for row in file["results"]]
        assert settings[0] == settings[-1] == {"kind": "dense"}
        assert [(s["kind"], s["skipped"]) for s in settings[1:-1]] == [(kind, k) for kind in kinds for k in (1.0, 2.0)]
        assert [row["build"] for row in file["results"]] == [*[""] * 5, "tiny:portable"]
    dense, static, *_, other = report["files"][0]["results"]
    assert other["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert (dense["layers"], static["layers"]) == (6.0, 5.0)
    assert dense["perplexity"]["low"] <= dense["perplexity"]["value"] <= dense["perplexity"]["high"]
    assert (report["bundle"], report["request"]["limit"], report["request"]["texts"]) == ("tiny", 2, ["own.txt"])


def test_eval_table_and_what_is_not_in_it(tiny_root: Path, text: Path) -> None:
    result = done(
        "eval", tiny_root, *TARGET, *SMALL, "--text", text, "--also", f"{tiny_root}:portable", "--budget", "0.95,0.01"
    )
    for expected in ("own.txt: 2 windows of 48 tokens, the first 10 dense", "static", "budget 0.95", "tiny:portable"):
        assert expected in result.stdout
    assert "budget 0.01" not in result.stdout
    assert "Not measured: static, budget 0.01." in result.stderr
    assert "Not measured: token, budget 0.01." in result.stderr


def test_eval_refuses(tiny_root: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_task(tmp_path, "own", QUESTIONS, CHOICES.replace("query", "question"))
    begin = ("eval", tiny_root, *TARGET)
    with monkeypatch.context() as measured:
        measured.setattr("dash_export.measure.score.score", Mock(side_effect=AssertionError))
        command = (*begin, "--text", text, "--tasks", "own", "--include-path", tmp_path)
        assert "cannot load the task 'own'" in refused(*command), "before anything is measured"
    assert "no text file" in refused(*begin, "--text", tmp_path / "none.txt")
    assert "none of the settings" in refused(*begin, "--text", text, "--skipped", "50")
    assert "longer than the model's context" in refused(*begin, "--text", text, "--window", 50_000)
    also = ("--also", f"{tiny_root}:portable")
    assert "Two builds are called" in refused(*begin, "--text", text, *also, *also, code=2)
    assert "give the target" in refused(*begin, "--text", text, "--also", tiny_root)
    assert "There is no bundle" in refused(*begin, "--text", text, "--also", tmp_path / "none:cpu")
    for wrong in ("--budget=1.5", "--budget=0", "--budget=much", "--skipped=0", "--kinds=magic"):
        refused(*begin, "--text", text, wrong, code=2)
    refused(*begin, "--text", text, "--budget", "0.9", "--skipped", "2", code=2)


def test_frontier(tiny_root: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "f.png"
    options = (*TARGET, *SMALL, "--text", text, "--kinds", "static,token", "--skipped", "1", "-o", output)
    result = done("frontier", tiny_root, *options, "--also", f"{tiny_root}:portable", "--rounds", 1, "--tokens", 8)
    assert sorted(path.name for path in output.parent.iterdir()) == ["f.json", "f.png", "f.svg"]
    assert output.read_bytes().startswith(b"\x89PNG")
    report = json.loads((output.parent / "f.json").read_text())
    assert [(point["quality"]["build"], point["quality"]["setting"]["kind"]) for point in report["points"]] == [
        ("", "dense"), ("", "static"), ("", "token"), ("tiny:portable", "dense"),
    ]  # fmt: skip
    assert all(point["time"] == point["timing"]["ratio"] for point in report["points"])
    assert [build["target"] for build in report["builds"].values()] == ["cpu-fp32", "portable"]
    for expected in ("rate", "token's KL", "predicted", "tiny:portable", "rate: per cent of perplexity paid"):
        assert expected in result.stdout
    with locked(output.with_suffix(".json"), "another one"):
        assert "is being written by dash-export another one" in refused("frontier", tiny_root, *options, "--rounds", 0)
    hostile = text.rename(tmp_path / "a$x_{\udcff.txt")  # bytes that are no UTF-8, and what looks like a formula
    assert dash("frontier", tiny_root, *options, "--text", hostile, "--rounds", 0).exit_code == 0
    report = json.loads((output.parent / "f.json").read_text())
    assert report["course"]["name"] == "a$x_{.txt", "and nothing of the folders above"
    assert all(point["timing"] is None and point["time"] == point["quality"]["time"] for point in report["points"])


def test_what_was_measured_is_kept_though_nobody_reads_it(
    tiny_root: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = ("frontier", tiny_root, *TARGET, *SMALL, "--text", text, "--kinds", "static", "--skipped", "1")
    monkeypatch.setattr("dash_export.commands.frontier._print", Mock(side_effect=BrokenPipeError))
    with suppress(BrokenPipeError):
        dash(*begin, "--rounds", 0, "-o", tmp_path / "g")
    assert (tmp_path / "g.png").is_file()
    for nameless in (".", "..", "/", tmp_path / ".."):
        assert "is a folder: give -o a name" in refused(*begin, "-o", nameless)


def test_what_is_no_report_of_ours_is_kept(tiny_root: Path, own_bundle: Path, tmp_path: Path) -> None:
    """Nor does a picture lie in a bundle, and nothing is written when a command fails."""
    for number, name in enumerate(("f.png", "f.svg", "f.json")):
        base = tmp_path / str(number) / "f"
        base.parent.mkdir()
        base.with_name(name).write_text("mine")
        said = refused("frontier", tiny_root, *TARGET, "-o", base)
        assert f"{name} exists and is no report of ours: it will not be overwritten" in said
        assert base.with_name(name).read_text() == "mine"
    for output in (own_bundle / "f", own_bundle / "onnx" / "f", own_bundle / "config"):
        assert "would lie inside the bundle" in refused("frontier", own_bundle, *TARGET, "-o", output)
    refused("frontier", own_bundle, *TARGET, "-o", own_bundle / "onnx" / "new" / "f")
    assert not (own_bundle / "onnx" / "new").exists(), "a lock's folder is made in no place that is refused"
    assert not list(own_bundle.rglob("*.png"))
    base = tmp_path / "none" / "f"
    refused("frontier", tiny_root, *TARGET, "--text", tmp_path / "none.txt", "-o", base)
    assert not base.parent.exists()


def test_a_missing_extra_is_named(tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("pictures", "report"):
        monkeypatch.delitem(sys.modules, f"dash_export.measure.{name}", raising=False)
    for command in (("frontier", tiny_root), ("profile", tiny_root, "--html", "r.html")):
        assert "pip install 'dash-export[profile]'" in refused(*command, *TARGET)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "dash_export.measure.tasks", raising=False)
    assert "pip install 'dash-export[eval]'" in refused("eval", tiny_root, *TARGET, "--tasks", "arc_easy")


def test_what_was_measured_is_lost_neither_way(
    tiny_root: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = ("frontier", tiny_root, *TARGET, *SMALL, "--text", text)
    options = (*begin, "--kinds", "static", "--skipped", "1", "--rounds", 0)
    with monkeypatch.context() as late:  # what is in the way has come after it was looked for
        late.setattr("dash_export.commands.frontier.sole_writer", MagicMock())
        (tmp_path / "f.png").mkdir()
        (tmp_path / "old.svg").write_text(REPORT)
        (tmp_path / "f.svg").symlink_to("old.svg")
        (tmp_path / "f.json").write_text("mine")
        (tmp_path / "f-2.json").write_text("mine too")
        result = done(*options, "-o", tmp_path / "f")
    assert f"f.json is no report of ours any more: it is kept, and {tmp_path / 'f-3.json'} is written" in result.stderr
    assert json.loads((tmp_path / "f-3.json").read_text())["points"]
    assert (tmp_path / "f-2.png").is_file()
    assert (tmp_path / "f-2.svg").is_file()
    assert [(tmp_path / name).read_text() for name in ("f.json", "f-2.json", "f.svg")] == ["mine", "mine too", REPORT]
    with monkeypatch.context() as closed:  # whoever read what is printed has gone
        closed.setattr("dash_export.commands.frontier._print", Mock(side_effect=BrokenPipeError))
        with suppress(BrokenPipeError):
            dash(*options, "-o", tmp_path / "g")
    assert (tmp_path / "g.png").is_file()
    for nameless in (".", "..", "/", tmp_path / ".."):
        assert "is a folder: give -o a name" in refused(*options, "-o", nameless)
