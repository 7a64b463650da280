"""The cost table, from times that are made up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count
from types import SimpleNamespace

import pytest

from dash_export import DashRuntime
from dash_export.builders import measure
from dash_export.runtime.backends.base import Launch
from dash_export.runtime.backends.onnxruntime import OrtBackend
from dash_export.stretches import TokenTime

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
    monkeypatch.setattr(measure, "_moving", lambda *_: 0.125)  # of tokens over a millisecond
    runtime = stretched_runtime("plain")
    cost = measure.measure_cost(runtime.bundle, runtime.build, OrtBackend(0))
    dense = 3 * OTHER + 7 * RUN - 5 * LAUNCH
    assert cost.moving == 0.125
    assert cost.launch == pytest.approx(LAUNCH / dense, rel=0.02)
    assert list(cost.cost.values()) == [pytest.approx((RUN - SKIP) / dense, rel=0.02)] * 7
    assert set(cost.skip_us) == {f"skip_{layer:02d}" for layer in (2, 3, 4, 5, 6, 8, 9)}
    assert cost.segment_us["layer_04"] / cost.skip_us["skip_04"] == pytest.approx(RUN / SKIP, rel=0.02)


@pytest.mark.parametrize(("hidden", "found"), [(0.0, 0.0), (0.08, 0.08), (-0.05, 0.0)])
def test_what_a_set_that_moves_costs(hidden: float, found: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that is now quick, now slow: a token takes what the cost table says, and `hidden` where it skips
    other layers than the token before, once the caches have forgotten those of the run before.
    """
    gated = list(range(2, 14))
    cost = SimpleNamespace(cost=dict.fromkeys(gated, 0.05), launch=0.0, moving=0.0)
    time = TokenTime(SimpleNamespace(cost=cost, segments=(), stretches=()))  # type: ignore[arg-type]
    tokens: list[frozenset[int]] = []
    block = measure.SETTLE + measure.RUN

    def timed(launches: Iterable[Launch]) -> list[float]:
        (skipped,) = launches
        tokens.append(skipped)  # type: ignore[arg-type]
        pair, place = divmod(len(tokens) - 1, 2 * block)
        moved = hidden if tokens[-1] != tokens[-2:][0] else 0.0
        cold = 5.0 if place % block < measure.SETTLE else 0.0
        return [100 * (1 + pair % 3) * (time.of(tokens[-1]) + moved) + cold]  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "_timed", timed)
    step = SimpleNamespace(launches_of=lambda rule: (rule.skipped,))
    assert measure._moving(step, time, gated, 40) == pytest.approx(found, abs=1e-9)  # type: ignore[arg-type]
    assert len(tokens) == 10 * 2 * block
    assert {len(skipped) for skipped in tokens} == {0, 4}
