"""The cost table, from times that are made up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count

import pytest

from dash_export import DashRuntime
from dash_export.builders import measure
from dash_export.runtime.backends.base import Launch
from dash_export.runtime.backends.onnxruntime import OrtBackend


def test_what_a_unit_costs(tiny_runtime: Callable[..., DashRuntime], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that takes longer and longer. Units 2-3 and 4 are skipped in turn; 0-1 and 5 always run."""
    passes = count()

    def timed(launches: Iterable[Launch]) -> list[float]:
        assert len(list(launches)) == 4
        repeat, parity = divmod(next(passes), 2)
        found = [500.0, 200.0, 30.0, 300.0] if parity else [500.0, 40.0, 100.0, 300.0]
        return [(1 + repeat / 100) * time for time in found]

    monkeypatch.setattr(measure, "_timed", timed)
    runtime = tiny_runtime()
    table = measure.measure_cost(runtime.bundle, runtime.build, OrtBackend(0))
    assert table.cost == pytest.approx((160 / 1100, 70 / 1100), rel=0.02)
    assert set(table.bypass_us) == {"bypass_02-03", "bypass_04-04"}
    assert table.segment_us["layers_02-03"] / table.bypass_us["bypass_02-03"] == pytest.approx(5, rel=0.02)
