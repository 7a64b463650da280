"""Costs, dial and savings as they are measured on a device."""

from dataclasses import replace

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.backends.cuda.cuda import Cuda
from dash_export.backends.cuda.onnxruntime_cuda import OrtCuda
from dash_export.backends.tensorrt.tensorrt import TensorRT
from dash_export.building import cost_table, dial_table
from dash_export.building.cost_table import measure_cost
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.records import build_faults
from dash_export.core.dial import DialPoint, Mode
from dash_export.core.kinds import Setting
from dash_export.errors import PolicyError
from dash_export.serve.scheduler import Scheduler
from dash_export.serve.tickets import Request
from tests.backends.cuda.conftest import DISPATCH, IDS, MakeOnCard
from tests.standin.trt import Engine


@pytest.mark.usefixtures("card")
def test_costs_and_dial_are_measured(device_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial_table, "WINDOWS", 1)
    monkeypatch.setattr(dial_table, "TOKENS", 40)
    monkeypatch.setattr(dial_table, "SHARES", (0.2, 0.6))
    made = device_bundle.load_build("trt10")
    cost = measure_cost(device_bundle, made, TensorRT("tensorrt"))
    assert {*cost.segment_us, *cost.bypass_us, "policy"} == set(made.engines)
    assert cost.device == "a card (compute capability 12.0)"
    cost = replace(cost, cost=(0.2, 0.1), asks=0.05, modes={"device": Mode(0.02, 1.25)})
    made = replace(made, cost=cost)
    points = dial_table.calibrate_dial(device_bundle, made, TensorRT("tensorrt"))
    assert [points[0].layers, points[-1].layers] == [6, 3]
    assert points[0].time == 1.05, "the policy is asked although nothing is skipped"
    assert abs(points[-1].time - (1.05 - cost.token_time(np.zeros((2, 1)))[0] + 0.7)) < 1e-4
    build = replace(made, dial=points)
    session = DashRuntime(device_bundle, build, TensorRT("tensorrt")).session("token", budget=0.9)
    assert session.rules.rule.limits[0] > 0
    device = DashRuntime(device_bundle, build, TensorRT("tensorrt"), "device")
    asked = 1.02 - 1.25 * (1.05 - 0.9)  # of the same skips, by the times of that mode
    limits = device.session("token", budget=asked).rules.rule.limits
    np.testing.assert_allclose(limits, session.rules.rule.limits, rtol=1e-6)
    assert device.cost.token_time(np.ones((2, 1)), asked=True)[0] == pytest.approx(1.02 - 1.25 * 0.3)
    other = DashRuntime(device_bundle, build, TensorRT("tensorrt"), "sync")
    with pytest.raises(PolicyError, match="times are of dispatch 'overlapped'"):
        other.session("token", budget=0.9)
    with pytest.raises(PolicyError, match="times are of dispatch 'overlapped'"):
        Scheduler(other).submit(Request(IDS[:9], setting=Setting(budget=0.9)), lambda _: None)
    found = (DialPoint(0.0, 6, 1.0, 0.0), DialPoint(1.0, 4, 0.8, 0.1, 1.01))
    runtimes = (
        DashRuntime(device_bundle, replace(build, dial=found), TensorRT("tensorrt"), dispatch)
        for dispatch in ("overlapped", "sync")
    )
    assert [runtime.recommended for runtime in runtimes] == [Setting("token", budget=0.8, hold=False), Setting("dense")]


@pytest.mark.parametrize("dispatch", [*DISPATCH, "fastest"])
def test_what_a_skip_saves_is_measured_by_whole_tokens(
    dispatch: str, on_card: MakeOnCard, device_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are dispatched: by a clock that each engine's run moves, and each call of the host."""
    made, clock = on_card("trt10"), [0.0]
    takes = {"layers_02-03": 0.4, "layer_04": 0.2, "bypass_02-03": 0.1, "bypass_04-04": 0.05, "policy": 0.07}
    sound, waited = Engine.run, Cuda.wait_for_event

    def run(engine: Engine, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        clock[0] += takes.get(engine.name, 0.1)
        return sound(engine, feeds)

    def wait(device: Cuda, event: str) -> None:  # what decisions in a graph save
        clock[0] += 0.045
        waited(device, event)

    monkeypatch.setattr(Engine, "run", run)
    monkeypatch.setattr(Cuda, "wait_for_event", wait)
    monkeypatch.setattr(cost_table.time, "perf_counter", lambda: clock[0])
    recipe = made.runtime.recipe
    build = replace(made.runtime.build, recipe=replace(recipe, runtime=replace(recipe.runtime, dispatch=dispatch)))
    assert build.dispatch == ("overlapped" if dispatch == "fastest" else dispatch)
    cost = measure_cost(device_bundle, build, TensorRT("tensorrt"))
    dense, best = 0.3 + 0.4 + 0.2, "device" if dispatch == "fastest" else dispatch
    assert cost.dispatch == replace(build, cost=cost).dispatch == best
    asks = {mode: (0.07 if mode == "device" else 0.115) / dense for mode in DISPATCH}
    np.testing.assert_allclose(cost.asks, asks.pop(best), atol=1e-5)
    assert {mode: pytest.approx(own.asks, abs=1e-5) for mode, own in cost.modes.items()} == asks
    np.testing.assert_allclose([own.saved for own in cost.modes.values()], 1.0, rtol=1e-4)
    np.testing.assert_allclose(cost.dense_us, 1e6 * dense, rtol=1e-6)
    np.testing.assert_allclose(cost.cost, [0.3 / dense, 0.15 / dense], rtol=1e-6)


@pytest.mark.usefixtures("card")
def test_a_mode_that_is_not_possible_has_no_times(device_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be another one's."""
    monkeypatch.setattr(cost_table, "_whole_tokens", lambda *_: cost_table._Tokens(10.0, 1.0, [4.0, 2.0]))
    cost = measure_cost(device_bundle, device_bundle.load_build("ort"), OrtCuda())
    assert sorted([cost.dispatch, *cost.modes]) == ["overlapped", "sync"]


def test_units_that_seem_to_save_more_than_a_token(
    on_card: MakeOnCard, device_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise on a busy machine: the table is one that a bundle may hold, in every mode."""
    made = on_card("trt10")
    noise = iter([9.0, 5.0, 70.0])
    monkeypatch.setattr(cost_table, "_whole_tokens", lambda *_: cost_table._Tokens(10.0, 1.0, [next(noise), 4.0]))
    cost = measure_cost(device_bundle, made.runtime.build, TensorRT("tensorrt"))
    assert not list(build_faults(replace(made.runtime.build, cost=cost), device_bundle.manifest))
