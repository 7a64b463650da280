"""`--verify`: every engine against its portable graph; it sees what is broken on purpose."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from dash_export.backends.maker import backend_of
from dash_export.building import build, verify
from dash_export.building.engine_graphs import engine_graphs, lower_graph, write_whole
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.recipe import Recipe, load_recipe, recipe_names, with_weights
from dash_export.bundle.records import Verification
from dash_export.errors import BackendError
from dash_export.graphs.lower import trt, trt_decompose
from dash_export.graphs.lower.surgery import load_graph
from tests.commands.helpers import done
from tests.tiny import tiny_bundle

FORMS = {
    (recipe.dialect, recipe.engine.activations, recipe.engine.sequences > 1, *recipe.precisions.values()): name
    for name in recipe_names()
    if (recipe := load_recipe(name)).engine is not None
}
"""What makes graphs of a GPU's recipes different -> one of these recipes."""


def checked(bundle: Bundle, recipe: Recipe) -> Verification:
    segments = backend_of(recipe).segments(bundle.manifest)
    return verify.verify_engines(bundle, recipe, segments, {}, bundle.root / "none")


def errors(bundle: Bundle, recipe: Recipe) -> dict[str, float]:
    return {name: max(found.values()) for name, found in checked(bundle, recipe).engines.items()}


@pytest.mark.parametrize("target", FORMS.values())
def test_every_recipes_graphs_are_valid_and_agree(target: str, tiny_root: Path, tmp_path: Path) -> None:
    """The ONNX checker at the dialect's opset, and ONNX Runtime: every engine of every form of shipped recipes."""
    recipe = load_recipe(target)
    bundle = Bundle.open(tiny_root)
    found = checked(bundle, recipe)
    assert len(found.engines) == 5 + 2 + 1, "segments, bypasses and the policy"
    assert recipe.engine is not None
    for graph in engine_graphs(bundle, backend_of(recipe).segments(bundle.manifest), on_device=True):
        path = write_whole(lower_graph(bundle, graph, recipe), tmp_path / "lowered.onnx")
        model = onnx.load(path, load_external_data=False)
        promised = {"portable": 24, "trt10": 21}[recipe.dialect]
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", promised)]
        onnx.checker.check_model(str(path), full_check=True)
    assert ("bf16 is not there" in found.compared) == (recipe.engine.activations == "bf16")


@pytest.mark.parametrize(
    ("family", "form", "options"),
    [
        ("llama", "linear", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
        ("llama", "none", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
        ("qwen2", "linear", {"num_key_value_heads": 4}),
        ("qwen3", "none", {"head_dim": 32}),
    ],
)
def test_the_lowering_itself_changes_nothing(family: str, form: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The form of a recipe of each dialect without its rounding: what is left is an error of the lowering."""
    bundle = Bundle.open(tiny_bundle(tmp_path, form=form, family=family, **options))
    exact: dict[str, Any] = dict.fromkeys(("layers", "qkv", "ungated", "head", "embedding", "bypass"), "fp32")
    for recipe in map(load_recipe, ("rtx", "cuda")):
        assert recipe.engine is not None
        engine = replace(recipe.engine, activations="fp32")
        recipe = replace(recipe, weights=replace(recipe.weights, **exact), engine=engine)
        assert max(errors(bundle, recipe).values()) < 1e-5


def test_rounding_stays_within_its_bounds(tiny_root: Path) -> None:
    bundle = Bundle.open(tiny_root)
    for target in ("rtx", "cuda"):
        assert max(errors(bundle, load_recipe(target)).values()) < 0.005, target
    for weights, smallest in (("int8", 0.003), ("int4", 0.03)):
        found = errors(bundle, with_weights(load_recipe("rtx"), weights))
        assert min(error for name, error in found.items() if name.startswith("layer")) > smallest, "really quantised"


def unrotated(graph: ir.Graph, node: ir.Node) -> None:
    node.outputs[0].replace_all_uses_with(node.inputs[0])
    graph.remove(node, safe=True)


@pytest.mark.parametrize(("name", "broken"), [("rotary", unrotated), ("MASKED", 0.0)])
def test_a_broken_lowering_is_seen(name: str, broken: object, tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_decompose, name, broken)
    with pytest.raises(BackendError, match="do not agree with their portable graphs"):
        checked(Bundle.open(tiny_root), load_recipe("cuda"))


def test_the_result_is_kept_and_not_made_twice(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = done("build", own_bundle, "--target", "cuda", "--verify")
    assert "Verified: 8 engines, lowered graphs at fp16 in ONNX Runtime on a CPU; largest error 0.00" in result.stdout
    kept = Bundle.open(own_bundle).load_build("cuda")
    assert kept.verification is not None
    assert set(kept.verification.engines) == set(kept.engines)
    monkeypatch.setattr(verify, "verify_engines", None)
    assert build(own_bundle, "cuda", verify=True) == kept
    assert build(own_bundle, "cuda") == kept


def test_cpu_engines_agree_too(own_bundle: Path) -> None:
    """Here the engine files themselves run; a later `--verify` adds its result to a build that is already there."""
    for recipe, weights in (("cpu", "fp32"), ("portable", None)):
        before = Bundle.open(own_bundle).load_build(f"{recipe}-{weights}" if weights else recipe)
        made = build(own_bundle, recipe, weights=weights, verify=True)
        assert (made.cost, made.dial) == (before.cost, before.dial), "nothing was measured again"
        assert made.verification is not None
        found = made.verification.engines
        assert max((error for own in found.values() for error in own.values()), default=0.0) < 1e-4
        assert found.keys() == (made.engines.keys() if weights else set())


@pytest.mark.parametrize("name", ["mixed_02-03", "bypass_02-03"])
def test_a_damaged_cpu_engine_is_refused(name: str, own_bundle: Path) -> None:
    """Another engine's work under this one's name; a mixed engine is compared as run and as skipped."""
    bundle = Bundle.open(own_bundle)
    made = bundle.load_build("cpu-fp32")
    files = {engine: bundle.path(record.file) for engine, record in made.engines.items()}
    graph = ir.load(files[name])
    for value in graph.graph.initializers.values():
        if value.name is not None and value.name.endswith((".bias", "o_proj.weight")) and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy() + np.float32(0.5), name=value.name)
    ir.save(graph, files[name])
    recipe = with_weights(load_recipe("cpu"), "fp32")
    with pytest.raises(BackendError, match=name):
        verify.verify_engines(bundle, recipe, made.segments, files, bundle.root / "none")


def test_bf16_graphs_are_bf16(tiny_root: Path) -> None:
    """What CPU verification cannot run is at least of the right type: no product is left at float32."""
    bundle = Bundle.open(tiny_root)
    model = trt.lower(load_graph(bundle.graph("layer_03")), bundle.manifest, load_recipe("h100"))
    types = {
        value.dtype for node in model.graph for value in node.inputs if value is not None and node.op_type == "MatMul"
    }
    assert types == {ir.DataType.BFLOAT16}
