"""How a model is cut into segments."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given

from dash_export.builders.plan import plan_segments
from dash_export.decision import Unit, parse_units
from tests.test_decision import LAYERS, some_units


def names(units: str, *cut: int) -> list[str]:
    return [segment.name for segment in plan_segments(10, parse_units(units) if units else (), cut)]


def test_units_and_what_lies_between_them_are_engines() -> None:
    assert names("") == ["layers_00-09"]
    assert names("4") == ["layers_00-03", "layer_04", "layers_05-09"]
    assert names("1-2,3-5") == ["layer_00", "layers_01-02", "layers_03-05", "layers_06-09"]
    assert names("8-9") == ["layers_00-07", "layers_08-09", "head"]


def test_a_state_that_a_policy_reads_is_an_engines_output() -> None:
    assert names("4-6", 3) == ["layers_00-02", "layer_03", "layers_04-06", "layers_07-09"]
    assert names("4-6", 0) == ["embed", "layers_00-03", "layers_04-06", "layers_07-09"]


@given(some_units())
def test_every_layer_once(units: tuple[Unit, ...]) -> None:
    for cut in ((), (units[0].first - 1,)) if units else ((),):
        segments = plan_segments(LAYERS, units, cut)
        assert [layer for segment in segments for layer in segment.layers] == list(range(LAYERS))
        assert tuple(Unit(segment.first, segment.last) for segment in segments if segment.gated) == units
        assert [segment.embed for segment in segments] == [True] + [False] * (len(segments) - 1)
        assert [segment.head for segment in segments] == [False] * (len(segments) - 1) + [True]
        assert len({segment.name for segment in segments}) == len(segments)
        if not cut:
            assert not any(not a.gated and not b.gated and b.layers for a, b in pairwise(segments))
