"""The `ort` dialect: what a lowered engine consists of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from dash_export.build_record import Build
from dash_export.builders import build
from dash_export.bundle import Bundle
from dash_export.errors import BundleError
from dash_export.exporting import export
from dash_export.graphs.compose import load_graph, specialise_policy
from dash_export.graphs.ort.quantize import quantize_block
from dash_export.runtime.backends.onnxruntime import start_thread_pool
from tests.tiny import tiny_bundle, tiny_checkpoint, tiny_policy


@pytest.fixture(scope="module", params=["fp32", "int8", "int4"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Build]:
    root = tmp_path_factory.mktemp("lowered")
    checkpoint = tiny_checkpoint(root / "model")
    bundle = export(checkpoint, root / "tiny.dash", tiny_policy(checkpoint))
    return bundle, build(bundle, "cpu", weights=request.param)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def test_every_engine_loads(built: tuple[Bundle, Build]) -> None:
    start_thread_pool(0)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    bundle, made = built
    assert {"layers_00-01", "layers_00-01.policy", "layer_02", "skip_02", "skip_02.policy", "policy_02"} <= set(
        made.engines
    )
    for engine in made.engines.values():
        onnxruntime.InferenceSession(bundle.path(engine.file), options, providers=["CPUExecutionProvider"])


def test_attention_is_one_node_and_weights_are_quantised(built: tuple[Bundle, Build]) -> None:
    bundle, made = built
    layer = operators(bundle.path(made.engines["layer_03"].file))
    assert layer["GroupQueryAttention"] == 1
    assert not {"Attention", "TensorScatter", "RotaryEmbedding"} & set(layer)
    assert layer["SkipSimplifiedLayerNormalization"] == 1
    quantised = made.recipe["weights"]["layers"] != "fp32"
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


def test_a_skip_graph_leaves_the_cache_to_the_host(built: tuple[Bundle, Build]) -> None:
    bundle, made = built
    path = bundle.path(made.engines["skip_03"].file)
    assert not {"TensorScatter", "Transpose", "Reshape"} & set(operators(path))
    graph = onnx.load(path, load_external_data=False).graph
    assert {value.name for value in graph.input} == {"hidden", "position_ids"}
    rows = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in graph.output
    }
    assert rows == {
        "hidden_out": ["batch", "sequence", 64],
        "new_key_3": ["batch", "sequence", 32],
        "new_value_3": ["batch", "sequence", 32],
    }


def test_policy_and_plain_engine_share_their_weights(built: tuple[Bundle, Build]) -> None:
    bundle, made = built
    listed = {Path(record.name).name for record in made.files}
    for name in ("layer_02", "layer_02.policy"):
        model = onnx.load(bundle.path(made.engines[name].file), load_external_data=False)
        data = {
            entry.value
            for tensor in model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert data <= listed
    plain = onnx.load(bundle.path(made.engines["layer_02"].file), load_external_data=False)
    fused = onnx.load(bundle.path(made.engines["layer_02.policy"].file), load_external_data=False)
    assert "damage" not in {value.name for value in plain.graph.output}
    assert "damage" in {value.name for value in fused.graph.output}


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


def test_specialised_policy_needs_no_layer(tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle(tmp_path))
    policy = specialise_policy(load_graph(bundle.graph("policy")), [3])
    assert {value.name for value in policy.graph.inputs} == {"hidden", "actions"}
    assert "Gather" not in {node.op_type for node in policy.graph}


def test_only_a_linear_policy_decides_about_several_layers(tmp_path: Path) -> None:
    """A manifest may say so of any."""
    bundle = Bundle.open(tiny_bundle(tmp_path))
    with pytest.raises(BundleError, match="not linear"):
        specialise_policy(load_graph(bundle.graph("policy")), [2, 3])


def test_only_matrices_of_one_precision_are_packed(tmp_path: Path) -> None:
    """What is finer in the recipe stays finer in the engine: here the compensation beside K and V."""
    checkpoint = tiny_checkpoint(tmp_path / "model", num_hidden_layers=4)
    bundle = export(checkpoint, tmp_path / "tiny.dash", tiny_policy(checkpoint, "low_rank"))
    recipe = tmp_path / "mixed.toml"
    parts = {"layers": "int4", "qkv": "int4", "ungated": "int4", "head": "int8", "policy": "int8"}
    recipe.write_text(
        "[weights]\nblock_size = 16\n" + "".join(f"{part} = {value!r}\n" for part, value in parts.items())
    )
    made = build(bundle, str(recipe))
    graph = onnx.load(bundle.path(made.engines["skip_02"].file), load_external_data=False).graph
    matrices = {node.name: node for node in graph.node if node.op_type.startswith("MatMul")}
    assert matrices.keys() >= {"skip_02/attention/k_proj+v_proj", "skip_02/compensation/down"}
    packed = matrices["skip_02/attention/k_proj+v_proj"]
    assert next(item.i for item in packed.attribute if item.name == "bits") == 4
