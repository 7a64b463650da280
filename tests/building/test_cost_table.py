"""Costs of units, by a clock that is given."""

from collections.abc import Callable, Iterable
from itertools import count

import pytest

from dash_export import DashRuntime
from dash_export.backends.base import Launch
from dash_export.backends.onnxruntime.ort_engine import OrtBackend
from dash_export.building import cost_table
from dash_export.building.cost_table import measure_cost


def test_what_a_unit_costs(tiny_runtime: Callable[..., DashRuntime], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that takes longer and longer. Units 2-3 and 4 are skipped in turn; all else always runs."""
    passes = count()

    def timed(launches: Iterable[Launch]) -> list[float]:
        assert len(list(launches)) == 5
        repeat, parity = divmod(next(passes), 2)
        found = [100.0, 400.0, 200.0, 30.0, 300.0] if parity else [100.0, 400.0, 40.0, 100.0, 300.0]
        return [(1 + repeat / 100) * time for time in found]

    monkeypatch.setattr(cost_table, "_timed", timed)
    runtime = tiny_runtime()
    table = measure_cost(runtime.bundle, runtime.build, OrtBackend(0))
    assert table.cost == pytest.approx((160 / 1100, 70 / 1100), rel=0.02)
    assert set(table.bypass_us) == {"bypass_02-03", "bypass_04-04"}
    assert table.segment_us["layers_02-03"] / table.bypass_us["bypass_02-03"] == pytest.approx(5, rel=0.02)
