"""The cost table, from times that are made up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count

import pytest

from dash_export import DashRuntime
from dash_export.builders import measure
from dash_export.runtime.backends.base import Launch
from dash_export.runtime.backends.onnxruntime import OrtBackend

RUN, SKIP, LAUNCH, OTHER = 100.0, 30.0, 8.0, 500.0
"""Microseconds of a gated layer, of its skip, of a launch in either, and of a segment that always runs."""


def test_what_a_launch_costs(stretched_runtime: Callable[[str], DashRuntime], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that takes longer and longer. Gated are 2-6 and 8-9, skipped in turn; 0-1, 7 and the head run."""
    passes = count()

    def timed(launches: Iterable[Launch]) -> list[float]:
        repeat, parity = divmod(next(passes), 3)
        if parity == 2:
            assert len(list(launches)) == 5
            found = [OTHER, 5 * (RUN - LAUNCH) + LAUNCH, OTHER, 2 * (RUN - LAUNCH) + LAUNCH, OTHER]
        else:
            assert len(list(launches)) == 10
            gated = {layer: SKIP if layer % 2 == parity else RUN for layer in (2, 3, 4, 5, 6, 8, 9)}
            found = [gated.get(layer, OTHER) for layer in (0, 2, 3, 4, 5, 6, 7, 8, 9, -1)]
        return [(1 + repeat / 100) * time for time in found]

    monkeypatch.setattr(measure, "_timed", timed)
    runtime = stretched_runtime("plain")
    cost = measure.measure_cost(runtime.bundle, runtime.build, OrtBackend(0))
    dense = 3 * OTHER + 7 * RUN - 5 * LAUNCH
    assert cost.launch == pytest.approx(LAUNCH / dense, rel=0.02)
    assert list(cost.cost.values()) == [pytest.approx((RUN - SKIP) / dense, rel=0.02)] * 7
    assert set(cost.skip_us) == {f"skip_{layer:02d}" for layer in (2, 3, 4, 5, 6, 8, 9)}
    assert cost.segment_us["layer_04"] / cost.skip_us["skip_04"] == pytest.approx(RUN / SKIP, rel=0.02)
