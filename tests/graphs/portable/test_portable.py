"""The portable graphs: standard ONNX that passes the checker, readable, and runnable alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from dash_export import DashRuntime
from dash_export.bundle.bundle import Bundle
from dash_export.core.rule import decision_rule
from dash_export.models import open_checkpoint
from tests.runtime.prompts import prompts
from tests.tiny import random_actions, tiny_bundle

LoadRuntime = Callable[..., DashRuntime]
STEP_INPUTS = {"hidden", "position_ids", "write_indices", "rope.cos", "rope.sin"}


@pytest.fixture(scope="module", params=["none", "linear"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    family = "qwen2" if request.param == "none" else "qwen3"
    return Bundle.open(tiny_bundle(tmp_path_factory.mktemp(family), form=request.param, family=family))


def test_the_graph_table(bundle: Bundle) -> None:
    names = ["embed", *(f"layer_{n:02d}" for n in range(6)), "bypass_02-03", "bypass_04-04", "policy", "head"]
    assert sorted(bundle.manifest.graphs) == sorted(names)
    assert all(file == f"onnx/{name}.onnx" for name, file in bundle.manifest.graphs.items())


def test_every_graph_is_standard_and_readable(bundle: Bundle) -> None:
    for name in bundle.manifest.graphs:
        onnx.checker.check_model(str(bundle.graph(name)), full_check=True)
        check_readable(onnx.load(bundle.graph(name), load_external_data=False), name)


@pytest.mark.model
def test_smollm2_graphs(smollm2_bundle: Path) -> None:
    bundle = Bundle.open(smollm2_bundle)
    assert len(bundle.manifest.graphs) == 30 + len(bundle.manifest.policy.units) + 3
    for name in bundle.manifest.graphs:
        check_readable(onnx.load(bundle.graph(name), load_external_data=False), name)
    for name in ("embed", "layer_00", "layer_17", bundle.manifest.policy.units[0].bypass, "policy", "head"):
        onnx.checker.check_model(str(bundle.graph(name)), full_check=True)


def check_readable(model: onnx.ModelProto, name: str) -> None:
    assert {opset.domain: opset.version for opset in model.opset_import}.items() <= {"": 24, "ggml": 1}.items()
    assert {node.op_type for node in model.graph.node if node.domain} == {made.name for made in model.functions}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert all(node == name or node.startswith(f"{name}/") for node in names)
    assert model.graph.name == name
    assert model.graph.doc_string
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            assert entry.key != "location" or "/" not in entry.value


def test_weights_are_named_as_in_the_checkpoint(bundle: Bundle) -> None:
    checkpoint = open_checkpoint(bundle.root.parent / "model")
    found = set()
    for name in bundle.manifest.graphs:
        model = onnx.load(bundle.graph(name))
        for tensor in model.graph.initializer:
            if tensor.name not in checkpoint.weights:
                continue
            found.add(tensor.name)
            stored, weight = onnx.numpy_helper.to_array(tensor), checkpoint.weights[tensor.name]
            expected = weight.read_rows(0, weight.shape[0])
            transposed = expected.ndim == 2 and tensor.name.startswith("model.layers.")
            np.testing.assert_array_equal(stored, expected.T if transposed else expected, err_msg=tensor.name)
    assert found == set(checkpoint.weights)


def test_inputs_and_outputs_of_layer_and_bypass(bundle: Bundle) -> None:
    def names(graph: str) -> tuple[set[str], set[str]]:
        model = onnx.load(bundle.graph(graph), load_external_data=False)
        return {value.name for value in model.graph.input}, {value.name for value in model.graph.output}

    past = {"past_key_values.3.key", "past_key_values.3.value"}
    present = {"present.3.key", "present.3.value"}
    assert names("layer_03") == (STEP_INPUTS | past | {"attention_mask"}, {"hidden_out"} | present)
    assert names("bypass_02-03") == (
        STEP_INPUTS | past | {name.replace("3", "2") for name in past},
        {"hidden_out"} | present | {name.replace("3", "2") for name in present},
    )
    assert names("policy") == ({"hidden"}, {"damage"})
    assert names("embed") == ({"input_ids"}, {"hidden_out"})
    assert names("head") == ({"hidden", "first_logit"}, {"logits", "final_state"})


def test_large_weights_are_external_and_aligned(bundle: Bundle) -> None:
    model = onnx.load(bundle.graph("layer_00"), load_external_data=False)
    external = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert "model.layers.0.mlp.up_proj.weight" in {tensor.name for tensor in external}
    offsets = [int(entry.value) for tensor in external for entry in tensor.external_data if entry.key == "offset"]
    assert all(offset % 4096 == 0 for offset in offsets)


@pytest.mark.model
def test_portable_and_lowered_smollm2_agree(smollm2_runtime: LoadRuntime) -> None:
    portable, lowered = smollm2_runtime("portable"), smollm2_runtime("cpu-fp32")
    units = lowered.bundle.manifest.policy.units
    ids = prompts(portable)[0]
    actions = random_actions(len(ids), 30, units)
    for forced in (None, actions):
        logits = [runtime.session().logits(ids, actions=forced) for runtime in (portable, lowered)]
        assert np.abs(logits[0] - logits[1]).max() < 1e-3
    dial = lowered.build.dial
    rule = decision_rule(units, lowered.cost.cost, dial[len(dial) // 2].trade_off)  # skips, but not all
    one, other = (runtime.session_under(rule).generate(ids, 24) for runtime in (portable, lowered))
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.actions, other.actions)
    assert one.actions.any()
