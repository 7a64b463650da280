"""`build --no-portable`."""

from pathlib import Path

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.building import build
from dash_export.building.exporting import export
from dash_export.bundle.bundle import Bundle
from dash_export.errors import BundleError
from dash_export.models import Checkpoint
from tests.commands.helpers import done, refused
from tests.tiny import random_ids, tiny_policy


def test_engines_run_without_portable_graphs(tiny_model: Checkpoint, tmp_path: Path) -> None:
    bundle = export(tiny_model, tmp_path / "a.dash", tiny_policy(tiny_model, "linear"))
    build(bundle, "cpu", weights="fp32")
    expected = DashRuntime.load(bundle.root, "cpu-fp32").session().logits(random_ids(9))
    (bundle.root / ".tmp-onnx").mkdir()  # as a kill leaves it
    (bundle.root / "engines/cpu/calibration").mkdir(parents=True)
    result = done("build", bundle.root, "--weights", "fp32", "--no-portable")
    assert "engines/cpu-fp32" in result.stdout
    assert {path.name for path in bundle.root.iterdir() if path.is_dir()} == {"engines"}
    assert not (bundle.root / "engines/cpu/calibration").exists()
    np.testing.assert_array_equal(DashRuntime.load(bundle.root, "cpu-fp32").session().logits(random_ids(9)), expected)
    assert "Every file is what was written" in done("inspect", bundle.root, "--verify").stdout
    assert f"dash-export export MODEL -o {bundle.root}" in refused("build", bundle.root, "--weights", "int8")
    made = bundle.load_build("cpu-fp32")
    assert build(export(tiny_model, bundle.root, tiny_policy(tiny_model, "linear")), "cpu", weights="fp32") == made


def test_graphs_that_are_engines_stay(tiny_model: Checkpoint, tmp_path: Path) -> None:
    bundle = export(tiny_model, tmp_path / "a.dash")
    with pytest.raises(BundleError, match="'portable' are the portable graphs"):
        build(bundle, "portable", keep_portable=False)
    build(bundle, "portable")
    with pytest.raises(BundleError, match="'portable' are the portable graphs"):
        build(bundle, "cpu", weights="fp32", keep_portable=False)
    assert Bundle.open(bundle.root).has_graphs
