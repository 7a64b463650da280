"""The `ort` dialect: what an engine consists of, at which precision, and that extreme numbers survive it."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from dash_export import DashRuntime
from dash_export.building import build
from dash_export.building.exporting import export
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.recipe import WeightsRecipe
from dash_export.graphs.lower.ort_products import eight_bit_block
from dash_export.graphs.lower.rounded import weight_precision
from tests.tiny import random_ids, tiny_bundle, tiny_checkpoint, tiny_policy

Graphs = dict[str, onnx.GraphProto]


@pytest.fixture(scope="module", params=["fp32", "int8", "int4"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Graphs, set[str]]:
    """The weights' precision; every engine's graph, without weights; the files of the build."""
    bundle = Bundle.open(tiny_bundle(tmp_path_factory.mktemp("lowered"), form="linear", intermediate_size=256))
    made = build(bundle, "cpu", weights=request.param)
    files = {name: bundle.path(engine.file) for name, engine in made.engines.items()}
    graphs = {name: onnx.load(file, load_external_data=False).graph for name, file in files.items()}
    return request.param, graphs, {Path(record.name).name for record in made.files}


def operators(graph: onnx.GraphProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)


def test_layers(built: tuple[str, Graphs, set[str]]) -> None:
    """Attention is one node, weights are quantised, queries come scaled from their projection."""
    precision, graphs, _ = built
    units = {f"{kind}_{name}" for kind in ("bypass", "mixed") for name in ("02-03", "04-04")}
    assert set(graphs) == {"embed", "layers_00-01", "layers_02-03", "layer_04", "layer_05"} | units
    layer, embed = operators(graphs["layer_04"]), operators(graphs["embed"])
    assert (layer["GroupQueryAttention"], layer["SkipSimplifiedLayerNormalization"]) == (1, 1)
    assert not {"Attention", "TensorScatter", "RotaryEmbedding"} & set(layer)
    quantised = precision != "fp32"
    assert (layer["MatMulNBits"] > 0) == quantised
    assert (layer["MatMul"] > 0) != quantised
    assert ("GatherBlockQuantized" in embed) == quantised
    attentions = [node for node in graphs["layers_00-01"].node if node.op_type == "GroupQueryAttention"]
    assert [item.f for node in attentions for item in node.attribute if item.name == "scale"] == [1.0, 1.0]
    gives = [name for name, graph in graphs.items() if "damage" in {value.name for value in graph.output}]
    assert gives == ["layers_00-01"], "only what holds the layer that the policy reads"


def test_codes_of_8_bits_are_symmetric(built: tuple[str, Graphs, set[str]]) -> None:
    """Only those of 4 bits have zero points, which follow the inputs, codes and scales."""
    products = [node for graph in built[1].values() for node in graph.node if node.op_type == "MatMulNBits"]
    for node in products:
        numbers = {item.name: item.i for item in node.attribute}
        assert bool([*node.input, ""][3]) == (numbers["bits"] == 4)
        fitting = 64 if numbers["bits"] == 4 else eight_bit_block(numbers["K"], node.name)
        assert numbers["block_size"] == fitting
    assert bool(products) == (built[0] != "fp32")


@pytest.mark.parametrize(
    ("rows", "node", "block"),
    [(896, "gate_proj+up_proj", 128), (4864, "down_proj", 64), (576, "o_proj", 64), (96, "logits", 32), (48, "p", 16)],
)
def test_blocks_of_8_bits(rows: int, node: str, block: int) -> None:
    assert eight_bit_block(rows, f"layer_00/mlp/{node}") == block


def test_a_bypass_leaves_the_cache_to_the_host(built: tuple[str, Graphs, set[str]]) -> None:
    graph = built[1]["bypass_02-03"]
    assert not {"TensorScatter", "Transpose", "Reshape"} & set(operators(graph))
    assert {value.name for value in graph.input} == {"hidden", "position_ids", "rope.cos", "rope.sin"}
    rows = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in graph.output
    }
    new = {f"new_{which}_{layer}": ["batch", "sequence", 32] for which in ("key", "value") for layer in (2, 3)}
    assert rows == {"hidden_out": ["batch", "sequence", 64]} | new


def test_a_mixed_engine_has_no_weights_of_its_own(built: tuple[str, Graphs, set[str]]) -> None:
    _, graphs, files = built
    assert "mixed_02-03.data" not in files
    entries = [entry for tensor in graphs["mixed_02-03"].initializer for entry in tensor.external_data]
    data = {entry.value for entry in entries if entry.key == "location"}
    own = {"bypass_02-03.data", "layers_02-03.data"} & files
    assert data == own


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ("layer_03/mlp/down_proj", "int4"),
        ("layer_03/attention/q_proj+k_proj+v_proj", "int8"),
        ("layer_03/attention/o_proj", "int4"),
        ("bypass_03-04/product", "int8"),
        ("layer_00/update_0", "int8"),
        ("layer_00/mlp/up_proj", "fp32"),
        ("layer_00/attention/v_proj", "fp32"),
        ("head/logits", "int4"),
    ],
)
def test_which_part_of_a_recipe_a_matrix_obeys(node: str, expected: str) -> None:
    """Q, K and V are at least as fine as their layer."""
    recipe = WeightsRecipe(layers="int4", qkv="int8", ungated="fp32", head="int4", bypass="int8")
    assert weight_precision(node, recipe, (3, 4)) == expected


def test_a_huge_score_does_not_overflow(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    policy = tiny_policy(checkpoint)
    assert policy.network is not None
    policy = replace(policy, network=policy.network | {"bias": np.full(2, 1e5, np.float32)})
    bundle = export(checkpoint, tmp_path / "tiny.dash", policy)
    build(bundle, "cpu", weights="fp32")
    runtime = DashRuntime.load(bundle.root, "cpu-fp32")
    assert not runtime.generate(random_ids(4), 3, policy="token", trade_off=1.0).actions.any()
    np.testing.assert_allclose(runtime.session().score(random_ids(4)).damage, 1e5, rtol=1e-3)
