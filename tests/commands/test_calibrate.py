"""`calibrate`: of a model every layer, of a bundle its units."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.commands.helpers import dash, refused

TEXT = "The layers of a decoder are not equally needed, and some of them hardly at all. " * 20


def test_model(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "c.json"
    result = dash("calibrate", model, "--tokens", 128, "--sets", 2, "-o", output)
    assert result.exit_code == 0, result.output
    for expected in ("target cpu-fp32", "one unit skipped", "Greedy static sets", "Took"):
        assert expected in result.stdout
    report = json.loads(output.read_text())
    assert [unit["setting"]["skip"] for unit in report["units"]] == [[1], [2], [3], [4], [5]]
    assert [len(entry["setting"]["skip"]) for entry in report["sets"]] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_bundle(tiny_root: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text(TEXT)
    result = dash(
        "calibrate", tiny_root, "--target", "cpu-fp32", "--text", tmp_path / "own.txt", "--tokens", 128, "--sets", 0
    )
    assert result.exit_code == 0, result.output
    assert "target cpu-fp32" in result.stdout
    assert "2-3 " in result.stdout
    assert "Greedy" not in result.stdout


def test_refused(tiny_root: Path, tmp_path: Path) -> None:
    target = ("--target", "cpu-fp32")
    assert "no text file" in refused("calibrate", tiny_root, *target, "--text", tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refused("calibrate", tiny_root, *target, "--text", tmp_path / "binary")
    assert "no such model" in refused("calibrate", tmp_path / "nothing")
    refused("calibrate", tiny_root, "--tokens", 5, code=2)


def test_what_was_measured_is_kept_where_nobody_reads(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dash_export.commands.calibrate._print", Mock(side_effect=BrokenPipeError))
    path = tmp_path / "report.json"
    with suppress(BrokenPipeError):
        dash("calibrate", tiny_root, "--target", "cpu-fp32", "--tokens", 128, "--sets", 0, "-o", path)
    assert json.loads(path.read_text())["units"]
