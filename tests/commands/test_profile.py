"""`profile`: table, JSON, trace, report."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from dash_export.commands.reports import check_reports
from tests.commands.helpers import done, refused
from tests.forged import replace_text

TARGET = ("--target", "cpu-fp32")
SMALL = ("--context", 12, "--tokens", 4, "--repeats", 2)


@pytest.fixture
def begin(tiny_root: Path, text: Path) -> tuple[Any, ...]:
    return ("profile", tiny_root, *TARGET, "--text", text, *SMALL)


def test_json(begin: tuple[Any, ...]) -> None:
    also = ("--also", f"{begin[1]}:portable")
    result = done(*begin, "--kinds", "static,token", "--skipped", "1,99", *also, "--json")
    report = json.loads(result.stdout)
    lanes = [(lane["build"], lane["setting"]["kind"]) for lane in report["lanes"]]
    assert lanes == [("", "dense"), ("", "static"), ("", "token"), ("tiny:portable", "dense")]
    assert [item["setting"]["kind"] for item in report["refused"]] == ["static", "token"]
    assert report["course"] == {"text": "own.txt", "context": 12, "tokens": 4, "windows": 2, "rounds": 2}
    assert report["machine"]["cores"] >= 1
    for lane in report["lanes"]:
        assert set(lane["parts"]) == {"always", "run", "bypass", "deciding", "sampling", "host"}
        parts = sum(part["mean"] for part in lane["parts"].values())
        assert parts == pytest.approx(1e3 * lane["token_ms"]["mean"])
        assert lane["token_ms"]["count"] == 8
        assert lane["peak_memory"] > 1 << 24
        assert len(lane["segments"]) == 5
    dense, static, *_ = report["lanes"]
    assert (dense["layers"]["mean"], static["layers"]["mean"]) == (6, 5)


def test_tables_and_trace(begin: tuple[Any, ...], tmp_path: Path) -> None:
    output = tmp_path / "deep" / "t.json"
    result = done(*begin, "--kinds", "token", "--skipped", "1.5", "--trace", output)
    for expected in ("load before", "dense", "token, skipped 1.5", "bypasses", "deciding", "host gaps",
                     "layers_00-01", "bypass p50", "of run"):  # fmt: skip
        assert expected in result.stdout, expected
    assert f"Written to {output}" in result.output
    check_reports(output)  # it may be written over, and nothing else
    events = json.loads(output.read_text())["traceEvents"]
    assert sum(event.get("cat") == "token" for event in events) == 2 * 4


def test_refuses(begin: tuple[Any, ...], tmp_path: Path) -> None:
    """What is `profile`'s own; settings and builds are refused as in `eval`."""
    assert "at most 512 in all" in refused(*begin, "--context", 100_000)
    assert "Only TensorRT and TensorRT-RTX say how long the layers inside" in refused(*begin, "--layers")
    report, thesis = tmp_path / "r.html", tmp_path / "thesis.html"
    assert "none of the settings" in refused(*begin, "--skipped", "50", "--html", report)
    assert not report.exists()
    refused(*begin, "--repeats", "1", code=2)
    assert "are the same file" in refused(*begin, "--html", report, "--trace", report, code=2)
    thesis.write_text("<h1>mine</h1>")
    for option in ("--html", "--trace"):
        assert "is no report of ours: it will not be overwritten" in refused(*begin, "--skipped", "1", option, thesis)
    assert thesis.read_text() == "<h1>mine</h1>"


def test_report(begin: tuple[Any, ...], own_bundle: Path, text: Path, tmp_path: Path) -> None:
    """Of a model and a text with hostile names: nothing is fetched or run, and every picture is whole."""
    replace_text(own_bundle / "manifest.json", '"name": "model"', '"name": "<script>alert(1)</script> $x_"')
    report = tmp_path / "r.html"
    hostile = text.rename(tmp_path / "<b>\udcff.txt")  # bytes that are no UTF-8
    options = ("--text", hostile, "--kinds", "static,token", "--skipped", "1", "--html", report)
    done("profile", own_bundle, *begin[2:], *options)
    html = report.read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "&lt;b&gt;.txt" in html
    for heading in ("Time per token", "Where it goes", "Segments", "Skip map"):
        assert f"<h2>{heading}</h2>" in html
    pictures = re.findall(r'src="data:image/([a-z]+)[^,]*,([^"]*)"', html)
    assert [kind for kind, _ in pictures] == ["svg", "png", "png"]  # the breakdown, two skip maps
    for (kind, data), begins in zip(pictures, (b"<?xml", b"\x89PNG", b"\x89PNG"), strict=True):
        assert base64.b64decode(data).startswith(begins), kind
