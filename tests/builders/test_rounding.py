"""Calibrated rounding in a build: what is in the engines, and that it is worth it."""

from __future__ import annotations

import ast
import shutil
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from dash_export.builders import build, rounding
from dash_export.builders.rounding import calibrated
from dash_export.bundle import Bundle
from dash_export.exporting import export
from dash_export.graphs.ort.quantize import pack
from dash_export.graphs.rounded import Rounded
from dash_export.targets import load_recipe
from tests.tiny import tiny_checkpoint, tiny_policy

INT4 = {"layers": "int4", "qkv": "int4", "ungated": "int4", "head": "int4", "block_size": 32}


def recipe_file(folder: Path, **weights: Any) -> Path:
    lines = [f"{key} = {value!r}" for key, value in (INT4 | weights).items()]
    path = folder / f"{weights.get('rounding', 'nearest')}.toml"
    path.write_text("\n".join(["[weights]", *lines]))
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("rounding")
    checkpoint = tiny_checkpoint(root / "model")
    made = export(checkpoint, root / "tiny.dash", tiny_policy(checkpoint, "linear"))
    for kind in ("nearest", "gptq"):
        build(made, str(recipe_file(root, rounding=kind)))
    return made


def weights_of(bundle: Bundle, engine: str, part: str) -> list[np.ndarray]:
    """Packed codes, scales and zero points of the matrix whose node's name has `part` in it."""
    model = onnx.load(bundle.path(bundle.load_build("gptq").engines[engine].file))
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits" and part in node.name)
    arrays = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    return [arrays[name] for name in node.input[1:4]]


def assert_scaled_part(found: list[np.ndarray], rounded: tuple[np.ndarray, ...], scale: float) -> None:
    """The first rows of a packed matrix are this rounding's, times `scale`."""
    for index, (whole, expected) in enumerate(zip(found, rounded, strict=True)):
        wanted = expected * np.float32(scale) if index == 1 else expected
        np.testing.assert_array_equal(whole.reshape(-1, *wanted.shape[1:])[: len(wanted)], wanted)


def test_engines_hold_the_calibrated_codes(bundle: Bundle, tmp_path: Path) -> None:
    recipe = load_recipe(str(recipe_file(tmp_path, rounding="gptq")))
    with calibrated(bundle, recipe, tmp_path, lambda *_: None) as roundings:
        for engine, part, node in (
            ("layers_02-03", "layer_03/mlp/down_proj", "layer_03/mlp/down_proj"),
            ("layer_05", "head/logits", "head/logits"),
            ("layers_00-01", "layer_00/attention/o_proj", "layer_00/attention/o_proj"),
            ("layer_04", "q_proj", "layer_04/attention/q_proj"),
        ):
            rounded = roundings(node)
            assert rounded is not None
            if part == "q_proj":  # packed with K and V, and scaled for attention
                assert_scaled_part(weights_of(bundle, engine, part), pack(rounded), 16**-0.5)
                continue
            for found, expected in zip(weights_of(bundle, engine, part), pack(rounded), strict=True):
                np.testing.assert_array_equal(found, expected)
    assert list(tmp_path.glob(".tmp-*")) == []


def test_nothing_is_parsed_as_python_where_threads_read(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads in Python's parser at once: "AST constructor recursion depth mismatch", before 3.11.8."""
    recipe = load_recipe(str(recipe_file(tmp_path, rounding="gptq")))
    with calibrated(bundle, recipe, tmp_path, lambda *_: None) as roundings:
        first = roundings("layer_03/mlp/down_proj")
        with monkeypatch.context() as without:
            without.setattr(ast, "parse", None)
            again = roundings("layer_03/mlp/down_proj")
    assert first is not None
    assert again is not None
    np.testing.assert_array_equal(again.codes, first.codes)


def test_a_full_disk_is_told_as_one(tmp_path: Path) -> None:
    full = tmp_path / "full.safetensors"
    full.symlink_to("/dev/full")
    codes = np.zeros((64, 8), np.uint8)
    with pytest.raises(OSError, match="No space left"):
        rounding._write(full, Rounded(codes, codes[:1], codes[:1], 4, 64))


def test_an_interrupted_pass_leaves_nothing(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rounding, "gptq", stop)
    recipe = load_recipe(str(recipe_file(tmp_path, rounding="gptq")))
    with pytest.raises(KeyboardInterrupt), calibrated(bundle, recipe, tmp_path, lambda *_: None) as roundings:
        roundings("layer_03/mlp/down_proj")
    assert list(tmp_path.glob(".tmp-*")) == []


def test_a_finished_build_calibrates_nothing(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "gptq", None)
    again = build(bundle, str(recipe_file(tmp_path, rounding="gptq")))
    assert again == bundle.load_build("gptq")


def test_a_failed_pass_is_not_begun_again(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fails(*_: object) -> None:
        calls.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rounding, "gptq", fails)
    recipe = load_recipe(str(recipe_file(tmp_path, rounding="gptq")))
    with calibrated(bundle, recipe, tmp_path, lambda *_: None) as roundings:
        for _ in range(2):  # as the threads do that waited for the first
            with pytest.raises(OSError, match="No space"):
                roundings("layer_03/mlp/down_proj")
    assert len(calls) == 1


def test_a_calibration_ends_with_the_build(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches the thread that waits, not the one that calibrates: that one is told."""
    layers: list[str] = []
    started = threading.Event()

    def progress(name: str, _done: int, _total: int) -> None:
        if name.startswith("rounding"):
            layers.append(name)
            started.set()
            time.sleep(0.2)

    def interrupted(future: Future[None], *_: object) -> None:
        while not started.wait(0.01):
            if future.done():  # what engines share comes first
                return
        raise KeyboardInterrupt

    own = Bundle.open(shutil.copytree(bundle.root, tmp_path / "own.dash", ignore=shutil.ignore_patterns("engines")))
    monkeypatch.setattr(Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(own, str(recipe_file(tmp_path, rounding="gptq")), progress=progress)
    assert len(layers) < 3
