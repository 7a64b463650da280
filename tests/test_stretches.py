"""Which launches a token takes, and the time that a cost table gives it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_export.builders.plan import plan_segments, plan_stretches
from dash_export.stretches import TokenTime, cover, lengths

LAYERS = 12
GATED = (2, 3, 4, 5, 6, 8, 9)
STRETCHES = [(2, False, 5), (2, True, 2), (3, True, 2), (4, True, 2), (5, True, 2), (8, True, 2), (8, False, 2)]


def build_of(gated: tuple[int, ...], launch: float, stretches: bool = True) -> Any:
    cost = SimpleNamespace(cost=dict.fromkeys(gated, 0.05), launch=launch)
    planned = plan_stretches(gated, (1,)) if stretches else ()
    return SimpleNamespace(cost=cost, segments=plan_segments(LAYERS, gated), stretches=planned)


def covered(*skipped: int) -> list[tuple[int, int, bool]]:
    layers = [segment.first if segment.gated else -1 for segment in plan_segments(LAYERS, GATED)]
    return [(layers[part.index], part.count, part.skips) for part in cover(layers, skipped, lengths(STRETCHES))]


def test_the_longest_that_fits() -> None:
    end = [(-1, 1, False)]
    assert covered() == [(-1, 1, False), (2, 5, False), (-1, 1, False), (8, 2, False), *end]
    assert covered(8, 9) == [(-1, 1, False), (2, 5, False), (-1, 1, False), (8, 2, True), *end]
    first = [(2, 2, True), (4, 1, False), (5, 1, False), (6, 1, True)]
    assert covered(2, 3, 6, 9) == [*end, *first, *end, (8, 1, False), (9, 1, True), *end]
    assert covered(3, 4, 5, 6)[1:4] == [(2, 1, False), (3, 2, True), (5, 2, True)]
    assert covered(2, 3, 4)[1:5] == [(2, 2, True), (4, 1, True), (5, 1, False), (6, 1, False)]


@given(st.sets(st.integers(2, LAYERS - 1)), st.data())
def test_every_segment_once_and_under_its_own_action(gated: set[int], data: st.DataObject) -> None:
    skipped = data.draw(st.sets(st.sampled_from(sorted(gated)))) if gated else set()
    build = build_of(tuple(sorted(gated)), 0.0)
    known = lengths((item.first, item.skips, len(item.layers)) for item in build.stretches)
    layers = [segment.first if segment.gated else -1 for segment in build.segments]
    parts = cover(layers, skipped, known)
    assert [at for part in parts for at in range(part.index, part.index + part.count)] == list(range(len(layers)))
    for part in parts:
        own = layers[part.index : part.index + part.count]
        assert {layer in skipped for layer in own} == {part.skips}
        assert part.count == 1 or own == list(range(own[0], own[0] + part.count))


def test_time_is_that_of_layers_and_launches() -> None:
    time = TokenTime(build_of(GATED, 0.01))
    assert time.of(()) == 1.0
    assert time.of((8, 9)) == pytest.approx(0.9)  # one launch instead of one
    assert time.of((4,)) == pytest.approx(0.95 + 4 * 0.01)  # 2-6 fall apart
    actions = np.zeros((3, LAYERS), np.int8)
    actions[1, 4] = actions[2, [8, 9]] = 1
    assert time.total(actions) == pytest.approx(1.0 + 0.99 + 0.9)


def test_without_stretches_launches_are_all_the_same() -> None:
    time = TokenTime(build_of(GATED, 0.01, stretches=False))
    assert time.of((2, 4, 6)) == pytest.approx(0.85)
