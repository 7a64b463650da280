"""`--verify`: every engine against its portable graph; it sees what is broken on purpose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from dash_export.building import build, verify
from dash_export.building.backend import plan_segments
from dash_export.bundle import Bundle
from dash_export.errors import BackendError
from dash_export.exporting import export
from dash_export.graphs import trt, trt_decompose
from dash_export.graphs.surgery import load_graph
from dash_export.targets import Recipe, load_recipe, recipe_names, with_weights
from tests.commands.helpers import dash
from tests.tiny import tiny_bundle, tiny_checkpoint, tiny_policy

GPU_TARGETS = [name for name in recipe_names() if load_recipe(name).engine is not None]


def checks(bundle: Bundle, recipe: Recipe) -> dict[str, verify.Check]:
    policy = bundle.manifest.policy
    segments = plan_segments(bundle.manifest.model.num_layers, policy.units, (policy.read,))
    return {check.engine: check for check in verify.verify_graphs(bundle, recipe, segments, {})[0]}


def at_float32(name: str) -> Recipe:
    """The recipe's form without its rounding: what is left is an error of the lowering."""
    recipe = load_recipe(name)
    assert recipe.engine is not None
    exact: dict[str, Any] = dict.fromkeys(("layers", "qkv", "ungated", "head", "embedding", "bypass"), "fp32")
    weights = replace(recipe.weights, **exact)
    return replace(recipe, weights=weights, engine=replace(recipe.engine, activations="fp32"))


@pytest.mark.parametrize("target", GPU_TARGETS)
def test_every_recipes_graphs_are_valid_and_agree(target: str, tiny_root: Path) -> None:
    """The ONNX checker at the dialect's opset, and ONNX Runtime: every engine of every shipped recipe."""
    bundle = Bundle.open(tiny_root)
    found = checks(bundle, load_recipe(target))
    assert len(found) == 5 + 2 + 1, "segments, bypasses and the policy"
    verify.require_passed(list(found.values()), target)


@pytest.mark.parametrize("dialect", ["rtx", "cuda"])
@pytest.mark.parametrize(
    ("family", "form", "options"),
    [
        ("llama", "linear", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
        ("llama", "none", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
        ("qwen2", "linear", {"num_key_value_heads": 4}),
        ("qwen3", "none", {"head_dim": 32}),
    ],
)
def test_the_lowering_itself_changes_nothing(
    dialect: str, family: str, form: str, options: dict[str, Any], tmp_path: Path
) -> None:
    bundle = Bundle.open(tiny_bundle(tmp_path, form=form, family=family, **options))
    for check in checks(bundle, at_float32(dialect)).values():
        assert max(check.errors.values()) < 1e-5, check


def test_float16_stays_within_its_rounding(tiny_root: Path) -> None:
    for target in ("rtx", "cuda"):
        for check in checks(Bundle.open(tiny_root), load_recipe(target)).values():
            assert max(check.errors.values()) < 0.005, check


@pytest.mark.parametrize(("weights", "smallest"), [("int8", 0.003), ("int4", 0.03)])
def test_quantised_weights_are_really_quantised(weights: str, smallest: float, tiny_root: Path) -> None:
    found = checks(Bundle.open(tiny_root), with_weights(load_recipe("rtx"), weights, None, None))
    for name, check in found.items():
        if name.startswith("layer"):
            assert smallest < max(check.errors.values()), check
    verify.require_passed(list(found.values()), weights)


def unrotated(graph: ir.Graph, node: ir.Node) -> None:
    node.outputs[0].replace_all_uses_with(node.inputs[0])
    graph.remove(node, safe=True)


BROKEN = {"rotation": ("_rotary", unrotated), "mask": ("MASKED", 0.0)}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_lowering_is_seen(name: str, tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_decompose, *BROKEN[name])
    found = checks(Bundle.open(tiny_root), load_recipe("cuda"))
    assert not found["layers_02-03"].passed
    with pytest.raises(BackendError, match="do not agree with their portable graphs"):
        verify.require_passed(list(found.values()), "lowered graphs")


def test_a_wrong_opset_is_seen(tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_decompose, "OPSET", 24)
    with pytest.raises(BackendError, match="trt10 promises 21"):
        checks(Bundle.open(tiny_root), load_recipe("cuda"))


def test_the_result_is_kept_and_not_made_twice(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = dash("build", own_bundle, "--target", "cuda", "--verify")
    assert result.exit_code == 0, result.output
    assert "Verified: 8 engines, lowered graphs at fp16 in ONNX Runtime on a CPU; largest error 0.00" in result.stdout
    kept = Bundle.open(own_bundle).load_build("cuda")
    assert set(kept.details["verification"]["engines"]) == set(kept.engines)
    monkeypatch.setattr(verify, "verify_graphs", None)
    assert build(own_bundle, "cuda", verify=True) == kept
    assert build(own_bundle, "cuda") == kept


@pytest.mark.parametrize("target", ["cpu-fp32", "portable"])
def test_cpu_engines_agree_too(target: str, own_bundle: Path) -> None:
    """Here the engine files themselves run; a later `--verify` adds its result to a build that is already there."""
    before = Bundle.open(own_bundle).load_build(target)
    recipe, _, weights = target.partition("-")
    made = build(own_bundle, recipe, weights=weights or None, verify=True)
    assert made.cost == before.cost, "nothing was measured again"
    assert made.dial == before.dial
    errors = made.details["verification"]["engines"]
    assert max((error for found in errors.values() for error in found.values()), default=0.0) < 1e-4
    assert errors.keys() == (made.engines.keys() if target != "portable" else set())


def test_a_damaged_cpu_engine_is_refused(tmp_path: Path) -> None:
    """Another model's weights under this build's record."""
    root = tiny_bundle(tmp_path, "cpu")
    bundle = Bundle.open(root)
    made = bundle.load_build("cpu-fp32")
    path = bundle.path("engines/cpu-fp32/layers_02-03.data")
    path.write_bytes(bytes(reversed(path.read_bytes())))
    with np.errstate(all="ignore"), pytest.raises(BackendError, match="02-03"):
        verify.verification(bundle, made)


def test_full_precision_graphs_say_what_was_compared(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    bundle = export(checkpoint, tmp_path / "tiny.dash", tiny_policy(checkpoint))
    segments = plan_segments(6, bundle.manifest.policy.units, (1,))
    assert "bf16 is not there" in verify.verify_graphs(bundle, load_recipe("h100"), segments, {})[1]


def test_bf16_graphs_are_bf16(tiny_root: Path) -> None:
    """What CPU verification cannot run is at least of the right type: no product is left at float32."""
    bundle = Bundle.open(tiny_root)
    model = trt.lower(load_graph(bundle.graph("layer_03")), load_recipe("h100"), bundle.manifest.policy.layers)
    types = {
        value.dtype for node in model.graph for value in node.inputs if value is not None and node.op_type == "MatMul"
    }
    assert types == {ir.DataType.BFLOAT16}
