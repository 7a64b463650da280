"""Distilled scales: what the student computes, that it learns, and what a build has of it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from dash_export.builders import build, distil, rounding
from dash_export.builders.distil import _exact_model, _Student, distilled
from dash_export.builders.rounding import calibrated
from dash_export.bundle import Bundle
from dash_export.errors import BackendError, BundleError
from dash_export.exporting import export
from dash_export.graphs.rounded import Rounded
from dash_export.reference import Oracle
from dash_export.targets import load_recipe
from tests.builders.test_rounding import recipe_file
from tests.tiny import random_ids, tiny_checkpoint, tiny_policy


def silent(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("distil")
    checkpoint = tiny_checkpoint(root / "model")
    export(checkpoint, root / "tiny.dash", tiny_policy(checkpoint, "linear"))
    return root


@pytest.fixture(scope="module")
def bundle(root: Path) -> Bundle:
    return Bundle.open(root / "tiny.dash")


@pytest.fixture(scope="module")
def rounded(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rounded]:
    """As GPTQ leaves them."""
    folder = tmp_path_factory.mktemp("rounded")
    with calibrated(bundle, load_recipe(str(recipe_file(folder, rounding="gptq"))), folder, silent) as roundings:
        nodes = [f"layer_{layer:02d}/{part}" for layer in range(6) for part in ("attention/o_proj", "mlp/down_proj")]
        found = {node: roundings(node) for node in (*nodes, "layer_02/attention/k_proj", "head/logits")}
    assert all(found.values())
    return found  # type: ignore[return-value]


def test_the_exact_model_is_the_oracles(root: Path, bundle: Bundle) -> None:
    checkpoint = tiny_checkpoint(root / "again")
    ids = random_ids(20)
    expected = Oracle(checkpoint, tiny_policy(checkpoint, "linear")).forward(ids).logits
    found = _exact_model(bundle).float()(torch.from_numpy(ids)[None]).logits[0]
    # The weights went through bfloat16.
    assert np.abs(found.numpy() - expected).max() < 0.05 * np.abs(expected).max()


def test_the_student_is_either(bundle: Bundle, rounded: dict[str, Rounded]) -> None:
    student = _Student(_exact_model(bundle), rounded)
    ids = torch.from_numpy(random_ids(20))[None]
    with student._exact():
        exact = student._states(ids)
    torch.testing.assert_close(exact, _exact_model(bundle).model(ids).last_hidden_state[0])
    assert not torch.equal(student._states(ids), exact)
    for node, layer in student.layers.items():
        wanted = torch.from_numpy(rounded[node].dequantized().T.copy()).bfloat16()
        torch.testing.assert_close(layer.weight_now(), wanted)


def test_the_gradient_is_the_divergences(bundle: Bundle, rounded: dict[str, Rounded]) -> None:
    """Piece by piece as in one piece, and as differences have it."""
    student = _Student(_exact_model(bundle).float(), rounded)
    ids = torch.from_numpy(random_ids(24)).reshape(2, 12)
    pieces, distil.ROWS = distil.ROWS, 5
    try:
        before = student.learn(ids)
    finally:
        distil.ROWS = pieces
    gradients = {node: layer.stretch.grad.clone() for node, layer in student.layers.items()}  # type: ignore[union-attr]
    for node in ("layer_03/mlp/down_proj", "head/logits"):
        stretch, slope = student.layers[node].stretch, float(gradients[node].norm())
        direction = gradients[node] / slope
        with torch.no_grad():
            stretch += 1e-2 * direction
        after = _Student.learn(student, ids)
        with torch.no_grad():
            stretch -= 1e-2 * direction
        assert (after - before) / 1e-2 == pytest.approx(slope, rel=0.2)


def test_it_learns_and_keeps_the_codes(bundle: Bundle, rounded: dict[str, Rounded]) -> None:
    windows = np.resize(random_ids(64), (160, 16))
    steps: list[tuple[int, int]] = []
    tuned = distilled(bundle, rounded, windows, lambda _, done, of: steps.append((done, of)))
    assert steps == [(step, 40) for step in range(1, 41)]
    divergences = [
        _Student(_exact_model(bundle).float(), matrices).learn(torch.from_numpy(windows[:4]))
        for matrices in (rounded, tuned)
    ]
    assert divergences[1] < 0.9 * divergences[0]
    for node, matrix in tuned.items():
        np.testing.assert_array_equal(matrix.codes, rounded[node].codes)
        np.testing.assert_array_equal(matrix.zeros, rounded[node].zeros)
        assert (matrix.scales != rounded[node].scales).any()
        assert np.abs(matrix.scales / rounded[node].scales - 1).max() < 0.2


def test_a_build_has_the_tuned_scales(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(_bundle: Bundle, rounded: dict[str, Rounded], windows: np.ndarray, _: object) -> dict[str, Rounded]:
        assert windows.ndim == 2
        return {node: Rounded(m.codes, 2 * m.scales, m.zeros, m.bits, m.block) for node, m in rounded.items()}

    monkeypatch.setattr(distil, "distilled", doubled)
    found = {}
    for kind in ("gptq", "distilled"):
        with calibrated(bundle, load_recipe(str(recipe_file(tmp_path, rounding=kind))), tmp_path, silent) as roundings:
            found[kind] = roundings("layer_03/mlp/down_proj")
    assert found["gptq"] is not None
    assert found["distilled"] is not None
    np.testing.assert_array_equal(found["distilled"].scales, 2 * found["gptq"].scales)
    np.testing.assert_array_equal(found["distilled"].codes, found["gptq"].codes)


def test_a_build_by_the_command_lines_option_lies_beside(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "distilled", lambda _, rounded, *__: rounded)
    plain = build(bundle, str(recipe_file(tmp_path, rounding="gptq")))
    tuned = build(bundle, str(recipe_file(tmp_path, rounding="gptq")), rounding="distilled")
    assert (plain.target, tuned.target) == ("gptq", "gptq-distilled")
    assert tuned.engines["layer_04"].key != plain.engines["layer_04"].key


def test_without_torch(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    monkeypatch.setattr(rounding, "gptq", None)
    with pytest.raises(BackendError, match=r"needs torch. Run: pip install 'dash-export\[train\]'"):
        build(bundle, str(recipe_file(tmp_path, rounding="distilled")))


def test_a_config_of_another_model(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "config.json"
    other.write_text('{"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 3}')
    path = bundle.path
    monkeypatch.setattr(Bundle, "path", lambda _self, name: other if name == "config.json" else path(name))
    with pytest.raises(BundleError, match="does not describe the bundle's weights"):
        _exact_model(bundle)
