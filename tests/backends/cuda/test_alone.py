"""Single engines of a GPU build in Polygraphy: what they give is what their portable graphs give."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("polygraphy")

from polygraphy.exception import PolygraphyException
from polygraphy.tools import main

from dash_export.backends.cuda.alone import LoneEngines
from dash_export.building.engine_graphs import portable_file
from dash_export.building.graph_runs import graph_run, step_inputs
from dash_export.bundle.bundle import Bundle
from dash_export.polygraphy import runners
from dash_export.polygraphy.runners import DashEngineRunner, engine_feeds, find_engine
from tests.backends.cuda.conftest import IDS, MakeOnCard
from tests.standin.cuda import Card

CLOSE = {"trt10": 1e-4, "trt10-fp16": 0.01, "portable-bf16": 0.05}
"""Of the largest value, by target: 16 bits round."""


def runner_of(bundle: Bundle, card: Card, target: str, name: str) -> DashEngineRunner:
    runner = DashEngineRunner(str(bundle.root), target, name)
    runner.activate()
    card.devices.append(runner.engine._engines.device)
    return runner


@pytest.fixture
def shared_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process cannot have both kinds, and other tests have the runtime's."""
    monkeypatch.setattr(runners, "graph_run", lambda path, own_threads: graph_run(path))  # noqa: ARG005


@pytest.mark.parametrize(
    ("target", "name", "tokens"),
    [
        ("trt10", "layer_00", 3),
        ("trt10", "bypass_02-03", 1),
        ("trt10", "layer_05", 3),
        ("trt10", "policy", 1),
        ("trt10-fp16", "layer_01", 1),
        ("portable-bf16", "layer_04", 3),
    ],
)
@pytest.mark.usefixtures("shared_pool")
def test_an_engine_is_its_portable_graph(
    target: str, name: str, tokens: int, device_bundle: Bundle, card: Card, tmp_path: Path
) -> None:
    bundle = device_bundle
    segment = find_engine(bundle, bundle.load_build(target), name)
    graph = graph_run(portable_file(bundle, segment, name, tmp_path))
    runner = runner_of(bundle, card, target, name)
    for feed in engine_feeds(str(bundle.root), target, name, tokens, 7, 2):
        found = runner.infer({each: feed[each] for each in runner.get_input_metadata()})
        expected = graph(feed)
        assert found.keys() <= expected.keys()
        assert found.keys() >= {*(each for each in expected if each.startswith("present")), *list(expected)[:1]}
        for key, array in found.items():
            assert array.shape == expected[key].shape
            close = CLOSE[target] * np.abs(expected[key]).max()
            np.testing.assert_allclose(array, expected[key], atol=close)
        assert 0 < runner.last_inference_time() < 1
    assert card.calls["cudaEventElapsedTime"] == 2, "by events of the device"
    runner.deactivate()


def test_too_many_tokens_are_refused(device_bundle: Bundle, card: Card) -> None:
    def refused(name: str, tokens: int, start: int, capacity: int = 200) -> str:
        runner = runner_of(device_bundle, card, "trt10", name)
        feed: dict[str, Any] = step_inputs(device_bundle.manifest.decoder, start, tokens, capacity)
        for key, item in runner.get_input_metadata().items():
            shape = [size or (tokens, capacity)[axis - 1] for axis, size in enumerate(item.shape)]
            feed.setdefault(key, np.zeros(shape, np.float32))
        with pytest.raises(PolygraphyException) as error:
            runner.infer({key: feed[key] for key in runner.get_input_metadata()})
        runner.deactivate()
        return str(error.value)

    assert "layer_04 of this build takes 16 tokens at most, not 17: --dash-tokens" in refused("layer_04", 17, 0)
    assert "bypass_04-04 of this build takes 1 tokens at most, not 2" in refused("bypass_04-04", 2, 0)
    assert "hold 96 tokens and 97 are wanted" in refused("layer_04", 1, 96)


@pytest.mark.usefixtures("shared_pool")
def test_by_its_file(device_bundle: Bundle, card: Card, capsys: pytest.CaptureFixture[str]) -> None:
    file = device_bundle.root / "engines" / "trt10" / "layer_04.engine"
    run = ["run", str(file), "--dash", "--dash-context", "5", "--iterations", "2", "--sequential-runners"]
    assert main(run) == 0
    told = capsys.readouterr().out
    assert "present.4.key [dtype=float32" in told
    assert "Average inference time" in told
    assert card.calls["cudaEventElapsedTime"] == 2
    assert main([*run, "--dash-target", "portable"]) != 0
    assert "This engine is of the build trt10" in capsys.readouterr().err


@pytest.mark.parametrize("dispatch", ["sync", "overlapped"])
def test_the_policy_is_timed_where_it_runs(dispatch: str, on_card: MakeOnCard) -> None:
    engines: Any = on_card("trt10", dispatch).runtime.engines
    cache = engines.cache(8)
    cache.reserve(8)
    step = LoneEngines(engines, cache, 1)
    step.begin(IDS[:1])
    state = np.random.default_rng(0).standard_normal((1, engines.model.hidden_size)).astype(np.float32)
    damage = step.damage(state)
    assert step.device_us > 0
    np.testing.assert_array_equal(step.damage(), damage)
    assert np.abs(step.damage(2 * state[:, ::-1]) - damage).max() > 1e-4
