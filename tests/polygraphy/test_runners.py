"""The runners' own work, beside the runtime."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("polygraphy")

from polygraphy.exception import PolygraphyException

from dash_export import DashRuntime
from dash_export.building.engine_graphs import portable_file
from dash_export.building.graph_runs import graph_run, step_inputs
from dash_export.bundle.bundle import Bundle
from dash_export.errors import BundleError
from dash_export.polygraphy.runners import STEPS, DashEngineRunner, DashStepRunner, find_engine, token_feeds
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
    windows = [feed["input_ids"] for feed in token_feeds(str(tiny_root), 2, 10, STEPS + 1)]
    assert {window.shape for window in windows} == {(1, 12)}
    np.testing.assert_array_equal(windows[0][0, 2:], windows[1][0, :-2])
    np.testing.assert_array_equal(windows[0], windows[STEPS])


def test_an_engine_that_is_not_there(tiny_root: Path) -> None:
    bundle = Bundle.open(tiny_root)
    with pytest.raises(BundleError, match=r"layer_02 is part of the segment layers_02-03\. Engines: .*, layer_04, "):
        find_engine(bundle, bundle.load_build("cpu-fp32"), "layer_02")


def feed_of(runner: DashEngineRunner, count: int, capacity: int) -> dict[str, np.ndarray]:
    rng, sizes = np.random.default_rng(0), {1: count, 2: capacity}
    feed = {
        name: rng.standard_normal([size or sizes[axis] for axis, size in enumerate(item.shape)]).astype(np.float32)
        for name, item in runner.get_input_metadata().items()
    }
    known = step_inputs(runner.bundle.manifest.model, 0, count, capacity) | {"input_ids": random_ids(count)[None]}
    return feed | {name: array for name, array in known.items() if name in feed}


ENGINES = ["layer_04", "layers_02-03", "bypass_02-03", "layers_00-01", "layer_05"]


@pytest.mark.parametrize(
    ("target", "name"),
    [*(("cpu-fp32", name) for name in ENGINES), ("portable", "bypass_02-03"), ("portable", "policy")],
)
@pytest.mark.usefixtures("shared_pool")
def test_an_engine_is_its_portable_graph(target: str, name: str, tiny_root: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_root)
    segment = find_engine(bundle, bundle.load_build(target), name)
    graph = graph_run(portable_file(bundle, segment, name, tmp_path))
    with DashEngineRunner(str(tiny_root), target, name) as runner:
        feed = feed_of(runner, 3, 9)
        found = runner.infer(feed)
    expected = graph(step_inputs(bundle.manifest.model, 0, 3, 9) | feed)
    assert set(found) - set(expected) == ({"damage"} if name == "layers_00-01" else set())
    for key, array in expected.items():
        np.testing.assert_allclose(found[key], array, atol=1e-4)


@pytest.mark.usefixtures("shared_pool")
def test_positions_that_leave_the_cache_are_refused(tiny_root: Path) -> None:
    """The engine would write outside its cache, or elsewhere than it says."""
    with DashEngineRunner(str(tiny_root), "cpu-fp32", "layer_04") as runner:
        feed = feed_of(runner, 3, 8)
        for start, stride in ((8, 1), (2, 2), (-1, 1)):
            with pytest.raises(PolygraphyException, match="must be consecutive and inside a cache of 8 rows"):
                runner.infer(feed | {"position_ids": (start + stride * np.arange(3))[None]})
        assert runner.infer(feed | {"position_ids": np.arange(5, 8)[None]})["hidden_out"].shape[1] == 3


@pytest.mark.usefixtures("shared_pool")
def test_an_engine_that_is_swapped_after_its_hash_is_refused(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines, sound = own_bundle / "engines" / "cpu-fp32", Bundle.verify

    def verify(bundle: Bundle, *arguments: Any) -> Any:
        seal = sound(bundle, *arguments)
        shutil.copy(engines / "bypass_04-04.onnx", engines / "swapped")
        (engines / "swapped").replace(engines / "bypass_02-03.onnx")
        return seal

    monkeypatch.setattr(Bundle, "verify", verify)
    with pytest.raises(PolygraphyException, match="was replaced while it was read"):
        DashEngineRunner(str(own_bundle), "cpu-fp32", "bypass_02-03").activate()
