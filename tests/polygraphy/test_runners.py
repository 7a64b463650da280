"""The runners' own work, beside the runtime."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("polygraphy")


from dash_export import DashRuntime
from dash_export.building.engine_graphs import portable_file
from dash_export.building.graph_runs import graph_run, step_inputs
from dash_export.bundle import Bundle
from dash_export.errors import BundleError, RequestError
from dash_export.polygraphy import runners
from dash_export.polygraphy.runners import STEPS, DashStepRunner, EngineFacts, PortableEngine, StepInputs, find_engine
from dash_export.runtime.backends import load_backend, onnxruntime
from tests.tiny import random_ids


def test_a_whole_step_is_the_runtimes(tiny_root: Path) -> None:
    """Dense over all but the last tokens, then decode under the setting; every call begins anew."""
    ids = random_ids(12)
    expected = DashRuntime.load(tiny_root, "cpu-fp32").session(policy="token", trade_off=1.0).logits(ids, prefix=9)
    with DashStepRunner(str(tiny_root), "cpu-fp32", 3, policy="token", trade_off=1.0) as runner:
        for _ in range(2):
            logits = runner.infer({"input_ids": ids[None]})["logits"]
            np.testing.assert_allclose(logits[0], expected[9:], atol=1e-4)
        assert 0 < runner.last_inference_time() < 10


def test_inputs_are_windows_of_a_text(tiny_root: Path) -> None:
    windows = [feed["input_ids"] for feed in StepInputs(str(tiny_root), 2, 10, STEPS + 1)]
    assert {window.shape for window in windows} == {(1, 12)}
    np.testing.assert_array_equal(windows[0][0, 2:], windows[1][0, :-2])
    np.testing.assert_array_equal(windows[0], windows[STEPS])


def loaded(root: Path, target: str, name: str) -> tuple[Bundle, EngineFacts, PortableEngine]:
    bundle = Bundle.open(root)
    build = bundle.load_build(target)
    facts = find_engine(bundle, build, name)
    engine = load_backend("onnxruntime", 0).load(bundle.path(build.engines[name].file))
    return bundle, facts, PortableEngine(engine, facts, bundle.manifest.model, 2)


@pytest.mark.parametrize(("start", "stride"), [(8, 1), (2, 2), (-1, 1)])
def test_positions_that_leave_the_cache_are_refused(start: int, stride: int, tiny_root: Path) -> None:
    """The engine would write outside its cache, or elsewhere than it says."""
    _, _, engine = loaded(tiny_root, "cpu-fp32", "layer_04")
    sizes = {name: (dtype, [size or 3 for size in shape]) for name, (dtype, shape) in engine.inputs.items()}
    feed = {name: np.zeros(shape, dtype) for name, (dtype, shape) in sizes.items()}
    feed |= {name: np.zeros((1, 2, 8, array.shape[3]), np.float32) for name, array in feed.items() if "past" in name}
    feed["position_ids"] = (start + stride * np.arange(3))[None]
    with pytest.raises(RequestError, match="must be consecutive and inside a cache of 8 rows"):
        engine(feed)
    fine = feed | {name: array for name, array in step_inputs(5, 3, 8).items() if name in engine.inputs}
    assert engine(fine)[0]["hidden_out"].shape[1] == 3


ENGINES = ["layer_04", "layers_02-03", "bypass_02-03", "layers_00-01", "layer_05"]


@pytest.mark.parametrize(
    ("target", "name"),
    [*(("cpu-fp32", name) for name in ENGINES), ("portable", "bypass_02-03"), ("portable", "policy")],
)
def test_an_engine_is_its_portable_graph(target: str, name: str, tiny_root: Path, tmp_path: Path) -> None:
    bundle, facts, engine = loaded(tiny_root, target, name)
    graph = graph_run(portable_file(bundle, facts.segment, facts.portable, tmp_path))
    rng = np.random.default_rng(0)
    feed = {key: rng.standard_normal([size or 9 for size in shape]) for key, (_, shape) in engine.inputs.items()}
    feed = {key: array.astype(np.float32) for key, array in feed.items()} | {"position_ids": np.arange(3)[None]}
    known = step_inputs(0, 3, 9) | {"input_ids": random_ids(3)[None], "first_logit": np.array([1])}
    feed |= {key: array for key, array in known.items() if key in feed}
    feed |= {"hidden": feed["hidden"][:, :3]} if "hidden" in feed else {}
    found, _ = engine(feed)
    expected = graph(step_inputs(0, 3, 9) | feed)
    assert set(found) - set(expected) == ({"damage"} if name == "layers_00-01" else set())
    for key, array in expected.items():
        np.testing.assert_allclose(found[key], array, atol=1e-4)


def test_an_engine_that_is_swapped_after_its_hash_is_refused(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines, sound = own_bundle / "engines" / "cpu-fp32", Bundle.verify

    def verify(bundle: Bundle, *arguments: Any) -> Any:
        seal = sound(bundle, *arguments)
        shutil.copy(engines / "bypass_04-04.onnx", engines / "swapped")
        (engines / "swapped").replace(engines / "bypass_02-03.onnx")
        return seal

    monkeypatch.setattr(Bundle, "verify", verify)
    monkeypatch.setattr(onnxruntime, "OrtEngine", lambda *_: None)  # one process cannot have both kinds of pool
    with pytest.raises(BundleError, match="was replaced while it was read"):
        runners._load(str(own_bundle), "cpu-fp32", "bypass_02-03")
