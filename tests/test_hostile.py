"""Bundles made to harm: every one is refused by an error, and nothing outside is read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import dash_export
from dash_export import DashRuntime
from dash_export.artifacts import JOURNAL
from dash_export.building import build, calibrate
from dash_export.bundle import BUILD, Bundle
from dash_export.errors import BackendError, BundleError, DashError
from dash_export.graphs.surgery import load_graph
from tests.forged import edit, rehash

ENGINE, GRAPH = "engines/cpu-fp32/layer_04.onnx", "onnx/layer_02.onnx"


@pytest.fixture
def bundle(own_bundle: Path) -> Path:
    np.arange(1 << 16, dtype=np.float32).tofile(own_bundle.parent / "secret.data")
    return own_bundle


def rewritten(root: Path, name: str, change: Callable[[onnx.ModelProto], object]) -> None:
    """Change an .onnx file and every record of its hash: a forger has the whole bundle."""
    model = onnx.load(root / name, load_external_data=False)
    change(model)
    onnx.save(model, root / name)
    rehash(root, name)


def point_outside(location: str) -> Callable[[onnx.ModelProto], object]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location

    return change


OUTSIDE = ["../../../secret.data", "{root}/secret.data", "./../../../secret.data", "x/../../../../secret.data"]


@pytest.mark.parametrize("location", [*OUTSIDE, "leak.data"])
def test_weights_outside(location: str, bundle: Path) -> None:
    """By their path, or by a link, which is not in the manifest, so that no hash speaks against it."""
    for name in (ENGINE, GRAPH):
        (bundle / name).with_name("leak.data").symlink_to(bundle.parent / "secret.data")
        rewritten(bundle, name, point_outside(location.format(root=bundle.parent)))
    with pytest.raises(DashError):
        DashRuntime.load(bundle, "cpu-fp32")
    with pytest.raises(BundleError):
        load_graph(bundle / GRAPH)
    shutil.rmtree(bundle / "engines")
    with pytest.raises(BundleError):
        build(bundle, "cpu", weights="fp32")


def test_a_hard_link_is_named(bundle: Path) -> None:
    """onnx_ir refuses it; `cp -al` makes many."""
    os.link(bundle / "onnx/layer_02.data", bundle.parent / "second")
    shutil.rmtree(bundle / "engines")
    with pytest.raises(BundleError, match=r"layer_02\.data has a second name \(a hard link\).*Copy the bundle"):
        build(bundle, "cpu", weights="fp32")


def constant_outside(model: onnx.ModelProto) -> None:
    """External data hides in attributes too."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    model.graph.initializer.remove(tensor)
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = "../../secret.data"
    node = onnx.helper.make_node("Constant", [], [tensor.name], name="layer_02/constant", value=tensor)
    model.graph.node.insert(0, node)


def test_a_constant_from_elsewhere(bundle: Path) -> None:
    rewritten(bundle, GRAPH, constant_outside)
    shutil.rmtree(bundle / "engines")
    with pytest.raises(BundleError, match="leaves the bundle"):
        build(bundle, "cpu", weights="fp32")


@pytest.mark.parametrize(
    "name",
    [ENGINE, "engines/cpu-fp32/layer_04.data", GRAPH, "onnx/layer_02.data", "onnx/policy.onnx", "onnx/embed.onnx"],
)
@pytest.mark.parametrize("share", [0.0, 0.9])
def test_truncated(name: str, share: float, bundle: Path) -> None:
    """And hashed again."""
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data[: int(share * len(data))])
    rehash(bundle, name)
    if name.startswith("engines"):
        with pytest.raises(BackendError, match=r"refuses layer_04\.onnx"):
            DashRuntime.load(bundle, "cpu-fp32")
        return
    shutil.rmtree(bundle / "engines")
    with pytest.raises(DashError):
        build(bundle, "cpu", weights="fp32")


def test_a_graph_in_a_circle(bundle: Path) -> None:
    """For int4, whose rounding copies graphs."""

    def bite(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "MatMul")
        node.input[0] = node.output[0]

    rewritten(bundle, GRAPH, bite)
    with pytest.raises(DashError, match="not what this version writes") as raised:
        build(bundle, "cpu")
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("which", range(0, 20, 3))
def test_graph_that_lacks_a_node(which: int, bundle: Path) -> None:
    """An engine is made of a graph's weights: it is sound, and the graph is not what it is compared with."""
    rewritten(bundle, GRAPH, lambda model: model.graph.node.pop(which))
    shutil.rmtree(bundle / "engines")
    with pytest.raises(DashError):
        build(bundle, "cpu", weights="fp32", verify=True)


def unknown(model: onnx.ModelProto) -> None:
    """An operator that ONNX Runtime finds when it loads the graph."""
    model.graph.node.insert(0, onnx.helper.make_node("NoSuchOp", ["hidden"], ["nowhere"], name="layer_02/odd"))


def misshapen(model: onnx.ModelProto) -> None:
    """What it finds when it runs the graph: rows of 7 numbers, of which a state has no whole number."""
    for node in model.graph.node:
        node.input[:] = ["back" if name == "hidden" else name for name in node.input]
    for number, (before, after, width) in enumerate((("hidden", "sevens", 7), ("sevens", "back", 64))):
        shape = onnx.numpy_helper.from_array(np.array([1, -1, width]), f"shape_{width}")
        model.graph.initializer.append(shape)
        node = onnx.helper.make_node("Reshape", [before, shape.name], [after], name=f"layer_02/{after}")
        model.graph.node.insert(number, node)


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (unknown, {"target": "cpu"}),
        (misshapen, {"target": "cpu"}),
        (misshapen, {"target": "portable"}),
        (misshapen, {"target": "cpu", "weights": "fp32", "verify": True}),
    ],
)
def test_graph_that_onnx_runtime_does_not_run(
    change: Callable[[onnx.ModelProto], object], how: dict[str, Any], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is rounded, measured or compared."""
    monkeypatch.setattr(calibrate, "WINDOWS", calibrate.BATCH)
    rewritten(bundle, GRAPH, change)
    shutil.rmtree(bundle / "engines")
    with pytest.raises(BackendError, match=r"layer_02.* failed|refuses (layer_02|portable)"):
        build(bundle, **how)


def test_no_policy_is_no_damage(bundle: Path) -> None:
    """Damage that nobody computed would be 0: always skipped."""
    listing = bundle / "engines" / "portable" / BUILD
    edit(listing, lambda data: data["engines"].pop("policy"))
    first = "engines/cpu-fp32/layers_00-01.onnx"
    rewritten(bundle, first, lambda model: model.graph.output.pop([o.name for o in model.graph.output].index("damage")))
    for target in ("portable", "cpu-fp32"):
        with pytest.raises(BundleError, match="has no engine of the policy"):
            DashRuntime.load(bundle, target)


def test_changed_graph_is_not_built(bundle: Path) -> None:
    shutil.rmtree(bundle / "engines")
    data = bytearray((bundle / "onnx/layer_03.data").read_bytes())
    data[100] ^= 1
    (bundle / "onnx/layer_03.data").write_bytes(data)
    with pytest.raises(BundleError, match=r"onnx/layer_03\.data is not the file"):
        build(bundle, "cpu", weights="fp32")
    assert Bundle.open(bundle).targets() == []


@pytest.mark.parametrize("name", ["../../../keep.txt", "{outside}", "..", 7])
def test_a_journal_that_lists_what_lies_outside(name: object, bundle: Path) -> None:
    """What a build no longer needs it deletes: nothing that a journal from elsewhere only says is there."""
    outside = bundle.parent / "keep.txt"
    outside.write_text("mine")
    journal = bundle / "engines/cpu-fp32" / JOURNAL
    listed = str(outside) if name == "{outside}" else name
    odd = {"y": {}, "z": {"files": "abc"}, "n": {"files": 7}, "0": {"files": [{"name": "a\0"}]}}
    journal.write_text(json.dumps({"x": {"files": [{"name": listed}]}} | odd))
    build(bundle, "cpu", weights="fp32")
    assert outside.read_text() == "mine"
    assert "x" not in json.loads(journal.read_text())


def test_nothing_is_unpickled() -> None:
    """No module of the package reaches for a loader that runs what it reads."""
    package = Path(dash_export.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text, path
        # Its restricted reader knows tensors and plain values, and runs nothing.
        assert text.count("torch.load(") == text.count("weights_only=True"), path
        assert "eval(" not in text.replace(".eval()", ""), path
