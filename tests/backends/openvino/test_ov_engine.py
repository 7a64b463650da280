"""OpenVINO beside ONNX Runtime on the same portable graphs."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.backends.openvino import ov_engine
from dash_export.backends.openvino.ov_engine import OvDevice, settings
from dash_export.building import build
from dash_export.bundle.recipe import load_recipe
from dash_export.core.rule import ForcedRule
from dash_export.errors import BackendError, RecipeError
from tests.tiny import tiny_bundle
from tests.tiny_encoder import UNITS, encoder_bundle, random_pixels

CHOICES = np.array(
    [[False, True, False, False, True], [False, True, True, False, True], [False, True, True, True, True]]
)
FIELDS = ("pooled", "states", "probabilities")


@pytest.fixture(scope="module", params=["dinov2-registers-classes", "clip", "siglip", "dinov3-gated"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = encoder_bundle(tmp_path_factory.mktemp("encoder"), request.param)
    build(root, "openvino")
    return root


def test_same_results_as_onnx_runtime(bundle: Path) -> None:
    """Dense, all at one exit, by token policy, and a batch that leaves at several."""
    pixels = random_pixels(5)
    expected, found = (DashRuntime.load(bundle, target) for target in ("portable", "openvino"))
    asked = expected.encoder("token", trade_off=0.0).encode(pixels).damage
    limits = np.median(asked, axis=0)
    rules = [ForcedRule(np.zeros_like(CHOICES)), ForcedRule(CHOICES[:, 2:3].repeat(5, 1)), ForcedRule(CHOICES)]
    for rule in rules:
        both = []
        for runtime in (expected, found):
            encoder = runtime.encoder()
            encoder.rule = rule
            both.append(encoder.encode(pixels))
        for field in FIELDS:
            left, right = (getattr(one, field) for one in both)
            if left is not None:
                np.testing.assert_allclose(left, right, atol=1e-4, rtol=1e-4)
    # Each build has its own costs: the damage is the same, and so are actions under equal limits.
    damage = found.encoder("token", trade_off=0.0).encode(pixels).damage
    np.testing.assert_allclose(damage, asked, atol=1e-4, rtol=1e-4)
    sure = np.abs(asked - limits) > 1e-3
    np.testing.assert_array_equal((damage < limits)[sure], (asked < limits)[sure])
    decided = found.encoder("token", trade_off=float(np.median(asked / np.array(found.cost.cost)))).encode(pixels)
    for place, unit in enumerate(UNITS):
        assert set(decided.actions[:, unit.first].tolist()) <= {0, 1}, place
    assert decided.actions.any()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = encoder_bundle(tmp_path_factory.mktemp("one"))
    build(made, "openvino")
    return made


def test_threads_share_engines(root: Path) -> None:
    """And a later pass does not write into the memory of an earlier result."""
    encoder = DashRuntime.load(root, "openvino").encoder()
    pictures = [random_pixels(1 + seed % 3, seed=seed) for seed in range(12)]
    alone = [encoder.encode(one).pooled for one in pictures]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda one: encoder.encode(one).pooled, pictures))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_causal_lm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"for encoders.*16 times.*--target cpu"):
        build(tiny_bundle(tmp_path), "openvino")


def test_no_graph(tmp_path: Path) -> None:
    (tmp_path / "layer_00.onnx").write_bytes(b"no graph")
    with pytest.raises(BackendError, match=r"OpenVINO .* refuses layer_00\.onnx"):
        OvDevice(load_recipe("openvino"), 1, 10).load(tmp_path / "layer_00.onnx")


def test_a_graph_of_another_width(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "onnx", tmp_path / "onnx")
    engine = OvDevice(load_recipe("openvino"), 1, 10).load(tmp_path / "onnx" / "layer_00.onnx")
    state = np.zeros((1, 10, 31), np.float32)
    with pytest.raises(BackendError, match=r"layer_00\.onnx wants hidden .*not \[1, 10, 31\]"):
        engine.bind({"hidden": state}, {"hidden_out": state})
    with pytest.raises(BackendError, match=r"wants hidden .*not None"):
        engine.bind({}, {"hidden_out": state})


def test_an_output_of_another_shape(root: Path) -> None:
    """OpenVINO would leave it unwritten, without an error."""
    engine = OvDevice(load_recipe("openvino"), 1, 10).load(root / "onnx" / "layer_00.onnx")
    state = np.ones((1, 10, 32), np.float32)
    with pytest.raises(BackendError, match=r"wants hidden_out .*not \[1, 9, 32\]"):
        engine.bind({"hidden": state}, {"hidden_out": np.empty((1, 9, 32), np.float32)})
    out = np.full_like(state, np.nan)
    engine.bind({"hidden": state}, {"hidden_out": out})()
    assert np.isfinite(out).all()


def test_a_device_that_is_not_there(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "npu.toml"
    path.write_text((Path("engines") / "openvino.toml").read_text().replace('"CPU"', '"NPU.7"'))
    with pytest.raises(BackendError, match=r"no device 'NPU\.7' on this machine, only .*CPU"):
        build(root, path)


def test_a_precision_that_the_device_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        available_devices = ("CPU",)

        def get_property(self, *_: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(ov_engine, "core", Old)
    with pytest.raises(BackendError, match="no products in bf16: give --weights fp32"):
        settings(load_recipe("openvino", weights="bf16"), 1)


def test_only_the_policy_is_exact_in_bf16(root: Path) -> None:
    recipe = load_recipe("openvino", weights="bf16")
    try:
        device = OvDevice(recipe, 1, 10)
    except BackendError:
        pytest.skip("this processor has no bf16")
    for name, hint in (("policy", "f32"), ("layer_00", "bf16")):
        compiled = device.load(root / "onnx" / f"{name}.onnx")._compiled
        assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == hint
        assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


@pytest.mark.parametrize(("old", "new", "words"), [
    ('"portable"', '"ort"', "'ort': openvino takes 'portable'"),
    ('layers = "fp32"', 'layers = "int8"', "computes everything in one of 'fp32', 'bf16', 'fp16'"),
    ('head = "fp32"', 'head = "bf16"', "bf16, fp32"),
    ('"CPU"', '"TPU"', "openvino knows CPU, GPU and NPU"),
    ('"openvino"', '"onnxruntime"', "device is for the backend openvino"),
    ("[runtime]", '[runtime]\ndispatch = "overlapped"', "openvino takes 'sync'"),
    ("[runtime]", '[engine]\ncapabilities = ["8.9"]\n[runtime]', "openvino has none"),
])  # fmt: skip
def test_faults_of_a_recipe(old: str, new: str, words: str, tmp_path: Path) -> None:
    text = (Path("engines") / "openvino.toml").read_text().replace(old, new)
    text = text.replace('device = "CPU"', 'device = "GPU"')
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(RecipeError, match=words):
        load_recipe(str(tmp_path / "a.toml"))


def test_without_the_package(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dash_export.backends.base.find_spec", lambda _: None)
    for use in (lambda: build(root, "openvino"), lambda: DashRuntime.load(root, "openvino")):
        with pytest.raises(BackendError, match=r"pip install 'dash-export\[openvino\]'"):
            use()
