"""Bundles made to harm: every one is refused by an error, and nothing outside is read."""

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
from dash_export.building import build, calibrate
from dash_export.bundle.layout import BUILD
from dash_export.errors import BackendError, BundleError, DashError
from dash_export.graphs.lower.surgery import load_graph
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


def bite(model: onnx.ModelProto) -> None:
    """A graph in a circle."""
    node = next(node for node in model.graph.node if node.op_type == "MatMul")
    node.input[0] = node.output[0]


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


FAILS = r"layer_02.* failed|refuses (layer_02|portable)"
FP32 = {"target": "cpu", "weights": "fp32"}
GRAPHS: dict[str, tuple[Callable[[onnx.ModelProto], object], dict[str, Any], type[DashError], str | None]] = {
    "a constant from elsewhere": (constant_outside, FP32, BundleError, "leaves the bundle"),
    "a circle, where rounding copies graphs": (bite, {"target": "cpu"}, DashError, "not what this version writes"),
    "an unknown operator": (unknown, {"target": "cpu"}, BackendError, FAILS),
    "wrong shapes, while it is rounded": (misshapen, {"target": "cpu"}, BackendError, FAILS),
    "wrong shapes, while it is measured": (misshapen, {"target": "portable"}, BackendError, FAILS),
    "wrong shapes, while it is compared": (misshapen, FP32 | {"verify": True}, BackendError, FAILS),
    **{  # the engine, made of its weights, is sound, and the graph is not what it is compared with
        f"without node {at}": (lambda model, at=at: model.graph.node.pop(at), FP32 | {"verify": True}, DashError, None)
        for at in range(0, 20, 3)
    },
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_of_which_nothing_is_built(name: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, how, error, said = GRAPHS[name]
    monkeypatch.setattr(calibrate, "WINDOWS", calibrate.BATCH)
    rewritten(bundle, GRAPH, change)
    shutil.rmtree(bundle / "engines")
    with pytest.raises(error, match=said) as raised:
        build(bundle, **how)
    assert error is BackendError or len(str(raised.value)) < 600  # but for ONNX Runtime's own words


def test_no_policy_is_no_damage(bundle: Path) -> None:
    """Damage that nobody computed would be 0: always skipped."""
    listing = bundle / "engines" / "portable" / BUILD
    edit(listing, lambda data: data["engines"].pop("policy"))
    first = "engines/cpu-fp32/layers_00-01.onnx"
    rewritten(bundle, first, lambda model: model.graph.output.pop([o.name for o in model.graph.output].index("damage")))
    for target in ("portable", "cpu-fp32"):
        with pytest.raises(BundleError, match="has no engine of the policy"):
            DashRuntime.load(bundle, target)


def test_nothing_is_unpickled() -> None:
    """No module of the package reaches for a loader that runs what it reads."""
    package = Path(dash_export.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text, path
        # Its restricted reader knows tensors and plain values, and runs nothing.
        assert text.count("torch.load(") == text.count("weights_only=True"), path
        assert "eval(" not in text.replace(".eval()", ""), path
