"""`calibrate` and the library behind it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.calibration import Calibrator, Damage, essential_layers, text_windows
from dash_export.errors import RequestError
from tests.commands.helpers import dash, refused

TEXT = "The layers of a decoder are not equally needed, and some of them hardly at all. " * 20


def test_damage_against_plain_numpy(tiny_runtime: Callable[..., DashRuntime]) -> None:
    runtime = tiny_runtime("cpu-fp32", "plain")
    windows = text_windows(runtime, TEXT, 256)
    assert [len(window) for window in windows] == [128, 128]
    calibrator = Calibrator(runtime, windows)
    dense, one, two = calibrator.measure([(), (3,), (2, 4)])
    assert dense.kl == 0.0
    for damage, skip in ((dense, ()), (one, (3,)), (two, (2, 4))):
        divergence, surprise = [], []
        for window in windows:
            p, q = (
                _log_softmax(runtime.session("static", skip=layers).logits(window).astype(np.float64))[2:]
                for layers in ((), skip)
            )
            divergence.append((np.exp(p) * (p - q)).sum(-1))
            surprise.append(-q[np.arange(len(q) - 1), window[3:]])
        assert damage.kl == pytest.approx(np.concatenate(divergence).mean(), rel=1e-3, abs=1e-6)
        assert damage.perplexity == pytest.approx(np.exp(np.concatenate(surprise).mean()), rel=1e-5)
    assert 0 < one.kl < two.kl


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_greedy_sets_grow(tiny_runtime: Callable[..., DashRuntime]) -> None:
    runtime = tiny_runtime("cpu-fp32", "plain")
    calibrator = Calibrator(runtime, text_windows(runtime, TEXT, 128))
    singles = calibrator.single_layers()
    sets = calibrator.greedy_sets(singles, 9)
    assert [len(damage.skipped) for damage in sets] == [1, 2, 3]
    assert set(sets[0].skipped) < set(sets[1].skipped) < set(sets[2].skipped)
    assert sets[0].kl == min(damage.kl for damage in singles)
    assert calibrator.greedy_sets(singles, 0) == []


def test_essential_layers() -> None:
    damages = [Damage((layer,), kl, 1.0) for layer, kl in enumerate((9.0, 0.1, 0.2, 0.3, 1.3))]
    assert essential_layers(damages) == (0, 4)
    assert essential_layers([]) == ()


def test_short_text(tiny_runtime: Callable[..., DashRuntime]) -> None:
    with pytest.raises(RequestError, match="at least 128"):
        text_windows(tiny_runtime("cpu-fp32"), "too short", 512)


def test_model(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "c.json"
    result = dash("calibrate", model, "--tokens", 128, "--sets", 2, "-o", output)
    assert result.exit_code == 0, result.output
    for expected in ("target portable", "Suggested: dash-export export MODEL --gated", "Greedy static sets", "Took"):
        assert expected in result.stdout
    report = json.loads(output.read_text())
    assert [layer["skipped"] for layer in report["layers"]] == [[1], [2], [3], [4], [5]]
    assert [len(entry["skipped"]) for entry in report["sets"]] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_bundle(tiny_root: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text(TEXT)
    result = dash(
        "calibrate", tiny_root, "--target", "cpu-fp32", "--text", tmp_path / "own.txt", "--tokens", 128, "--sets", 0
    )
    assert result.exit_code == 0, result.output
    assert "target cpu-fp32" in result.stdout
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
    assert json.loads(path.read_text())["layers"]


def test_an_input_is_no_output(own_bundle: Path, tmp_path: Path) -> None:
    prose = tmp_path / "prose.txt"
    prose.write_text("mine")
    manifest = (own_bundle / "manifest.json").read_bytes()
    options = ("--target", "cpu-fp32", "--text", prose, "-o")
    assert "is no report of ours: it will not be overwritten" in refused("calibrate", own_bundle, *options, prose)
    refused("calibrate", own_bundle, *options, own_bundle / "manifest.json")
    assert "would lie inside the bundle" in refused("calibrate", own_bundle, *options, own_bundle / "new.json")
    assert (prose.read_text(), (own_bundle / "manifest.json").read_bytes()) == ("mine", manifest)
