"""TensorRT-RTX for real, on a machine without a GPU: what is compiled, from what, and what happens when it fails."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from dash_export.backends.maker import backend_of
from dash_export.backends.tensorrt import trt_api
from dash_export.backends.tensorrt.trt_maker import RtxBackend
from dash_export.building import build
from dash_export.building.calibrate import calibrate_matrices
from dash_export.building.cost_table import NOT_MEASURED
from dash_export.building.engine_graphs import engine_graphs, lower_graph
from dash_export.building.exporting import export
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.recipe import EngineRecipe, Recipe, load_recipe
from dash_export.bundle.records import POLICY, Build
from dash_export.core.policy import no_policy
from dash_export.core.units import Unit
from dash_export.errors import BackendError, BundleError
from dash_export.files.artifacts import ArtifactStore, no_progress
from dash_export.graphs.lower import trt
from dash_export.graphs.lower.rounded import Rounded, Roundings, to_nearest
from dash_export.graphs.lower.trt_quantize import quantize_symmetric
from dash_export.graphs.portable.writer import save_graph
from dash_export.models.bypasses import pruned
from tests.tiny import TINY_UNITS, tiny_bundle, tiny_checkpoint, tiny_policy
from tests.tiny_encoder import encoder_bundle

rtx = pytest.importorskip("tensorrt_rtx", reason="needs the RTX builder: pip install 'dash-export[rtx]' (Linux x86-64)")

FIRST_BYTES = b"vtrt"


def write_recipe(path: Path, weights: str = "fp16", engine: str = "", bypass: str = "") -> str:
    """A recipe of a small cache at `path`, everything at one precision but perhaps the bypasses."""
    own = "bf16" if 'activations = "bf16"' in engine else "fp16"
    parts = "".join(f'{part} = "{weights}"\n' for part in ("layers", "qkv", "ungated", "head"))
    rounding = "gptq" if weights == "fp8" else "nearest"
    path.write_text(
        f'backend = "tensorrt_rtx"\ndialect = "portable"\n'
        f'[engine]\ncapabilities = ["8.9"]\nkv_capacity = 64\n{engine}\n'
        f'[weights]\n{parts}embedding = "{own}"\nbypass = "{bypass or own}"\nblock_size = 64\nsymmetric = true\n'
        f'rounding = "{rounding}"\n'
        '[runtime]\ndispatch = "overlapped"\nprefill_chunk = 32\n'
    )
    return str(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle of five layers, units 2-3 and 4, built by the RTX builder. Copy it to change it."""
    folder = tmp_path_factory.mktemp("rtx")
    build(tiny_bundle(folder, form="linear", num_hidden_layers=5), write_recipe(folder / "mine.toml"))
    return folder


@pytest.fixture
def own(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "own"))


def loaded(folder: Path, target: str = "mine") -> Build:
    return Bundle.open(folder / "tiny.dash").load_build(target)


def lowered(bundle: Bundle, recipe: Recipe, roundings: Roundings = to_nearest) -> dict[str, onnx.GraphProto]:
    graphs = engine_graphs(bundle, backend_of(recipe).segments(bundle.manifest), on_device=True)
    return {graph.name: ir.to_proto(lower_graph(bundle, graph, recipe, roundings)).graph for graph in graphs}


def test_what_a_build_leaves(root: Path) -> None:
    """An engine for each segment and bypass and one of the policy, and how it was built; nothing was measured."""
    made, folder = loaded(root), root / "tiny.dash" / "engines" / "mine"
    segments = {"layer_00", "layer_01", "layers_02-03", "layer_04", "head"}
    assert set(made.engines) == segments | {"bypass_02-03", "bypass_04-04", "policy"}
    left = {path.name for path in folder.iterdir()}
    assert left == {f"{name}.engine" for name in made.engines} | {"build.json", ".journal.json"}
    for name, engine in made.engines.items():
        assert engine.file == f"engines/mine/{name}.engine"
        assert engine.seconds > 0
        data = (folder / f"{name}.engine").read_bytes()
        assert (len(data), data[:4]) == (engine.bytes, FIRST_BYTES)
    assert made.backend_version == rtx.__version__
    assert made.device == "any device of compute capability 8.9"
    assert made.details["capabilities"] == ["8.9"]
    assert made.details["profiles"] == ["decode", "prefill"]
    assert made.details["strongly_typed"] is True
    assert {"optimization_level", "aux_streams", "workspace_bytes", "compiler"} <= set(made.details)
    assert made.cost.device == NOT_MEASURED
    assert made.cost.segment_us == {}
    assert made.cost.cost == (2 / 5, 1 / 5)


@pytest.mark.parametrize("key", ["kv_capacity = 65", "profiles = 1"])
def test_what_an_engine_fixes_is_in_its_key(
    key: str, own: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_api.Toolkit, "compile", lambda *_: (FIRST_BYTES, b""))
    text = (own / "mine.toml").read_text()
    setting = key.partition(" ")[0]
    lines = [line for line in text.splitlines() if not line.startswith(setting)]
    (own / "mine.toml").write_text("\n".join(lines).replace("[engine]", f"[engine]\n{key}"))
    build(own / "tiny.dash", str(own / "mine.toml"))
    assert len(made) == 8


@pytest.mark.parametrize(
    ("family", "options", "form", "recipe"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, "linear", {"weights": "int8", "bypass": "int8"}),
        ("qwen3", {"tie_word_embeddings": True}, "linear", {"weights": "int4", "bypass": "int4"}),
        ("qwen3", {}, "none", {"weights": "bf16", "engine": 'activations = "bf16"\nprofiles = 1\nsequences = 3'}),
        ("qwen2", {}, "linear", {"weights": "fp8", "bypass": "fp8", "engine": 'activations = "bf16"'}),
    ],
)
def test_families_and_precisions_compile(
    family: str, options: dict[str, Any], form: str, recipe: dict[str, str], tmp_path: Path
) -> None:
    """A unit of several layers; the policy reads what the embedding gives. Graphs say what their portable ones do."""
    checkpoint = tiny_checkpoint(tmp_path / "model", family, num_hidden_layers=4, **options)
    policy = tiny_policy(checkpoint, form, units=(Unit(1, 2),))
    bundle = export(checkpoint, tmp_path / "tiny.dash", policy)
    made = build(bundle, write_recipe(tmp_path / "mine.toml", **recipe), verify=True)
    bundle.verify(made.files)
    assert made.verification is not None
    worst = max(error for own in made.verification.engines.values() for error in own.values())
    assert recipe["weights"] != "fp8" or 0.03 < worst < 0.13, "of both factors; their bound leaves room for real models"
    assert set(made.engines) == {"embed", "layer_00", "layers_01-02", "layer_03", "bypass_01-02", "policy"}


def test_a_bypass_has_its_own_precision(own: Path, tmp_path: Path) -> None:
    """Its product, and K and V with it; the policy stays as it is."""
    recipe = load_recipe(write_recipe(tmp_path / "mine.toml", bypass="int4"))
    bundle = Bundle.open(own / "tiny.dash")
    types = {name: {item.data_type for item in graph.initializer} for name, graph in lowered(bundle, recipe).items()}
    held = [name for name, found in types.items() if onnx.TensorProto.INT4 in found]
    assert held == ["bypass_02-03", "bypass_04-04"]
    assert onnx.TensorProto.FLOAT16 not in types["policy"]


def test_what_is_left_of_a_pruned_unit_has_the_precision_of_a_bypass(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    smaller = pruned(checkpoint, tiny_policy(checkpoint, "linear"), [TINY_UNITS[0]])
    bundle = export(smaller, tmp_path / "tiny.dash", no_policy(smaller.spec.num_layers, ()))
    recipe = load_recipe(write_recipe(tmp_path / "mine.toml", "fp16", bypass="int8"))
    stored = [item for graph in lowered(bundle, recipe).values() for item in graph.initializer]
    found = [list(item.dims) for item in stored if item.data_type == onnx.TensorProto.INT8]
    assert found == [[checkpoint.spec.hidden_size] * 2]


def test_no_scale_is_zero_in_float16(own: Path, tmp_path: Path) -> None:
    """As of a vocabulary's unused rows: TensorRT refuses a scale of 0, and ONNX Runtime does not."""
    _, scales = quantize_symmetric(np.full((32, 2), [1e-9, 0], np.float32), 8, 32)
    assert (scales.astype(np.float16) > 0).all()
    hidden = Bundle.open(own / "tiny.dash").manifest.model.hidden_size
    codes, zeros = (np.full((rows, hidden), 8, np.uint8) for rows in (hidden, hidden // 64))
    rounded = Rounded(codes, np.full(zeros.shape, 1e-9, np.float32), zeros, 64)
    recipe = load_recipe(write_recipe(tmp_path / "mine.toml", "int4"))
    graphs = lowered(Bundle.open(own / "tiny.dash"), recipe, {"layer_00/attention/o_proj": rounded}.get)
    stored = [item for graph in graphs.values() for item in graph.initializer if ".scales" in item.name]
    found = [onnx.numpy_helper.to_array(item) for item in stored]
    assert {array.dtype for array in found} == {np.dtype(np.float16)}
    assert all((array > 0).all() for array in found)


def test_both_factors_of_an_fp8_product_are_fp8(own: Path, tmp_path: Path) -> None:
    """At scales by which what the calibration text feeds them comes to 128 to 256, of 448."""
    bundle, seen = Bundle.open(own / "tiny.dash"), dict[str, float]()
    recipe = load_recipe(write_recipe(tmp_path / "mine.toml", "fp8"))
    for name, largest in calibrate_matrices(bundle, recipe, ArtifactStore(tmp_path / "layers"), "", no_progress):
        assert isinstance(largest, float)
        seen[name] = largest
    assert len(seen) == 7 * 5 + 1, "every projection and the head"
    graph = lowered(bundle, recipe, seen.get)["layers_02-03"]
    made = {value: node for node in graph.node for value in node.output}
    held = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    products = [node for node in graph.node if node.name in seen]
    assert len(products) == 14
    for node in products:
        data, weight = (made[name] for name in node.input)
        operators = data.op_type, weight.op_type, made[data.input[0]].op_type
        assert operators == ("DequantizeLinear", "DequantizeLinear", "QuantizeLinear")
        assert 128 < seen[node.name] / float(held[data.input[1]]) <= 256
        assert str(held[weight.input[0]].dtype) == "float8_e4m3fn"
    with pytest.raises(BundleError, match="layer_00/attention/k_proj is fed was not measured"):
        lowered(bundle, recipe)


def test_a_graph_that_does_not_compile_is_told_in_tensorrts_words(
    own: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """fp32 attention, which TensorRT does not have: what went wrong is in the message and no record is left. It has a
    product, a softmax and a product.
    """
    monkeypatch.setattr(trt, "set_activation_type", lambda *_args: None)
    text = (own / "mine.toml").read_text().replace("kv_capacity = 64", "kv_capacity = 48")
    (own / "mine.toml").write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr(trt_api.Toolkit, "_type", lambda *_: None)
        with pytest.raises(BackendError, match=r"TensorRT-RTX 1\..* cannot compile layer_00: .*\w+"):
            build(own / "tiny.dash", str(own / "mine.toml"))
    with pytest.raises(BundleError, match="is unfinished"):
        loaded(own)
    assert not list((own / "tiny.dash" / "engines" / "mine").glob(".tmp-*"))
    compiled, compile_one = dict[tuple[str, bool], list[Any]](), trt_api.Toolkit.compile

    def noted(
        self: trt_api.Toolkit, graph: Path, settings: Any, profiles: Any, timing: bytes = b"", fused: bool = True
    ) -> Any:
        compiled[graph.stem, fused] = list(profiles)
        return compile_one(self, graph, settings, profiles, timing, fused)

    monkeypatch.setattr(trt_api.Toolkit, "compile", noted)
    build(own / "tiny.dash", str(own / "mine.toml"))
    assert re.search(
        r"layer_00: TensorRT-RTX 1\..* does not compile it with fused attention .* it will read all rows", caplog.text
    )
    assert compiled["layer_00", False] == compiled["layer_00", True]
    assert len(compiled["layer_00", True]) == 2


def test_attention_is_told_how_many_rows_are_in_use(root: Path, tmp_path: Path) -> None:
    """What the parser made reads all rows of a cache, and scales them first. Nobody reads its result any more."""
    bundle, recipe = Bundle.open(root / "tiny.dash"), load_recipe(str(root / "mine.toml"))
    graph = next(each for each in engine_graphs(bundle, loaded(root).segments, True) if each.name == "layers_02-03")
    path = save_graph(lower_graph(bundle, graph, recipe), tmp_path / "unit.onnx")[0]
    toolkit = trt_api.load_toolkit("tensorrt_rtx")
    network = rtx.Builder(toolkit.logger).create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert rtx.OnnxParser(network, toolkit.logger).parse_from_file(str(path))
    parsed = network.num_layers
    toolkit._bound_attention(network)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    cast, largest, _, following = layers[parsed : parsed + 4]
    assert cast.get_input(0).name == "position_ids"
    kinds = rtx.LayerType.CAST, rtx.LayerType.REDUCE, rtx.LayerType.ELEMENTWISE
    assert (cast.type, largest.type, following.type) == kinds
    lengths = following.get_output(0)
    assert (lengths.dtype, tuple(lengths.shape)) == (rtx.int32, (1,))
    read = {layer.get_input(at).name for layer in layers for at in range(layer.num_inputs) if layer.get_input(at)}
    made = [layer for layer in layers[parsed:] if layer.type == rtx.LayerType.ATTENTION_INPUT]
    assert len(made) == 2
    for number, begin in zip((2, 3), made, strict=True):
        assert f"layer_{number:02d}/attention/attention" not in read
        keys, values, _, *_, last = (
            tensor.name for index in range(1, begin.num_inputs) if (tensor := begin.get_input(index))
        )
        assert (keys, values, last) == (f"present.{number}.key", f"present.{number}.value", lengths.name)
    results = {layer.get_output(0).name for layer in layers[parsed:] if layer.type == rtx.LayerType.ATTENTION_OUTPUT}
    assert results <= read


def test_a_graph_that_does_not_parse(tmp_path: Path) -> None:
    (tmp_path / "odd.onnx").write_bytes(b"this is no graph")
    with pytest.raises(BackendError, match=r"cannot (read|compile) odd"):
        trt_api.load_toolkit("tensorrt_rtx").compile(tmp_path / "odd.onnx", EngineRecipe(("8.9",)), ())


def test_a_capability_rtx_does_not_know(tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dash_export.backends.tensorrt.trt_maker.RTX_CAPABILITIES", ("9.0",))
    recipe = write_recipe(tmp_path / "odd.toml")
    Path(recipe).write_text(Path(recipe).read_text().replace("8.9", "9.0"))
    with pytest.raises(BackendError, match=r"does not compile for compute capability 9\.0"):
        build(own / "tiny.dash", recipe)


def test_the_rtx_recipe_asks_for_what_the_installed_bindings_know() -> None:
    recipe = load_recipe("rtx")
    assert recipe.engine is not None
    for capability in recipe.engine.capabilities:
        assert hasattr(rtx.ComputeCapability, f"SM{capability.replace('.', '')}")


@pytest.mark.parametrize(("name", "most"), [("h100", 32), ("a100", 16), ("l4", 8)])
def test_a_recipe_of_many_rows_is_tuned_for_all_of_them(name: str, most: int) -> None:
    recipe = load_recipe(name)
    assert recipe.engine is not None
    assert recipe.engine.sequences == most
    assert RtxBackend(recipe)._profiles()["together"] == ((2, 1), (most, 1), (most, 1))


@pytest.mark.parametrize("dialect", ["portable", "trt10"])
@pytest.mark.parametrize("family", ["dinov2-swiglu-classes", "dinov3", "siglip"])
def test_encoders_compile(family: str, dialect: str, tmp_path: Path) -> None:
    """Every segment, exit and the policy, for 1 to 32 pictures."""
    path = Path(write_recipe(tmp_path / "mine.toml"))
    path.write_text(path.read_text().replace('dialect = "portable"', f'dialect = "{dialect}"'))
    root = encoder_bundle(tmp_path, family)
    made = build(root, str(path))
    assert {POLICY, "bypass_03-04", "layer_01"} <= set(made.engines)
    assert all((root / engine.file).read_bytes()[:4] == FIRST_BYTES for engine in made.engines.values())
