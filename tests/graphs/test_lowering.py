"""The `ort` dialect: what a lowered engine consists of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from dash_export.building import build
from dash_export.bundle import Bundle
from dash_export.exporting import export
from dash_export.graphs.ort_quantize import quantize_block
from dash_export.manifest import Build
from dash_export.runtime.backends.onnxruntime import start_thread_pool
from tests.tiny import tiny_checkpoint, tiny_policy


@pytest.fixture(scope="module", params=["fp32", "int8", "int4"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Build]:
    root = tmp_path_factory.mktemp("lowered")
    checkpoint = tiny_checkpoint(root / "model")
    bundle = export(checkpoint, root / "tiny.dash", tiny_policy(checkpoint, "linear"))
    return bundle, build(bundle, "cpu", weights=request.param)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def test_every_engine_loads(built: tuple[Bundle, Build]) -> None:
    start_thread_pool(0)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    bundle, made = built
    units = {f"{kind}_{name}" for kind in ("bypass", "mixed") for name in ("02-03", "04-04")}
    assert set(made.engines) == {"layers_00-01", "layers_02-03", "layer_04", "layer_05"} | units
    for engine in made.engines.values():
        onnxruntime.InferenceSession(bundle.path(engine.file), options, providers=["CPUExecutionProvider"])


def test_attention_is_one_node_and_weights_are_quantised(built: tuple[Bundle, Build]) -> None:
    bundle, made = built
    layer = operators(bundle.path(made.engines["layer_04"].file))
    assert layer["GroupQueryAttention"] == 1
    assert not {"Attention", "TensorScatter", "RotaryEmbedding"} & set(layer)
    assert layer["SkipSimplifiedLayerNormalization"] == 1
    quantised = made.recipe.weights.layers != "fp32"
    assert (layer["MatMulNBits"] > 0) == quantised
    assert (layer["MatMul"] > 0) != quantised
    merged = operators(bundle.path(made.engines["layers_00-01"].file))
    assert merged["GroupQueryAttention"] == 2
    assert ("GatherBlockQuantized" in merged) == quantised


def test_queries_are_scaled_by_their_projection(built: tuple[Bundle, Build]) -> None:
    bundle, made = built
    model = onnx.load(bundle.path(made.engines["layers_00-01"].file), load_external_data=False)
    found = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    assert [item.f for node in found for item in node.attribute if item.name == "scale"] == [1.0, 1.0]


def test_a_bypass_leaves_the_cache_to_the_host(built: tuple[Bundle, Build]) -> None:
    bundle, made = built
    path = bundle.path(made.engines["bypass_02-03"].file)
    assert not {"TensorScatter", "Transpose", "Reshape"} & set(operators(path))
    graph = onnx.load(path, load_external_data=False).graph
    assert {value.name for value in graph.input} == {"hidden", "position_ids"}
    rows = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in graph.output
    }
    new = {f"new_{which}_{layer}": ["batch", "sequence", 32] for which in ("key", "value") for layer in (2, 3)}
    assert rows == {"hidden_out": ["batch", "sequence", 64]} | new


def test_only_what_holds_the_read_layer_gives_damage(built: tuple[Bundle, Build]) -> None:
    bundle, made = built

    def gives(name: str) -> bool:
        graph = onnx.load(bundle.path(made.engines[name].file), load_external_data=False).graph
        return "damage" in {value.name for value in graph.output}

    assert [name for name in made.engines if gives(name)] == ["layers_00-01"]


def test_a_mixed_engine_has_no_weights_of_its_own(built: tuple[Bundle, Build]) -> None:
    bundle, made = built
    assert f"engines/{made.target}/mixed_02-03.data" not in {record.name for record in made.files}
    model = onnx.load(bundle.path(made.engines["mixed_02-03"].file), load_external_data=False)
    data = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    own = {"bypass_02-03.data", "layers_02-03.data"} & {Path(record.name).name for record in made.files}
    assert own <= data <= own | {"rope.data"}


@pytest.mark.parametrize(("bits", "allowed"), [(8, 0.004), (4, 0.07)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_quantise_block(bits: int, allowed: float, symmetric: bool) -> None:
    """Dequantised by hand, a matrix comes back within half a step."""
    matrix = np.random.default_rng(0).standard_normal((128, 96)).astype(np.float32)
    packed, scales, zeros = quantize_block(matrix, bits, 32, symmetric)
    assert packed.shape == (96, 4, 32 * bits // 8)
    if bits == 4:
        values = np.stack([packed & 15, packed >> 4], axis=-1).reshape(96, 4, 32)
        middle = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(96, -1)[:, :4]
    else:
        values, middle = packed, zeros
    if symmetric:
        middle = np.full((96, 4), 1 << (bits - 1))
    restored = (values.astype(np.float32) - middle[..., None]) * scales[..., None]
    error = np.abs(restored.reshape(96, 128).T - matrix).max()
    assert error < allowed * np.abs(matrix).max() * (2 if symmetric else 1)
