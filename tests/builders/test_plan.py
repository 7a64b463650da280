"""How a model is cut into segments."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dash_export.builders.plan import plan_segments, plan_stretches
from dash_export.decision import decision_points
from dash_export.stretches import LONGEST_STRETCH

LAYERS = 10


def names(gated: tuple[int, ...], merge: bool = True) -> list[str]:
    return [segment.name for segment in plan_segments(LAYERS, gated, merge)]


def test_never_gated_neighbours_are_one_engine() -> None:
    assert names(()) == ["layers_00-09"]
    assert names((4,)) == ["layers_00-03", "layer_04", "layers_05-09"]
    assert names((1, 2)) == ["layer_00", "layer_01", "layer_02", "layers_03-09"]


def test_a_gated_last_layer_leaves_the_head_alone() -> None:
    assert names((9,)) == ["layers_00-08", "layer_09", "head"]


def test_layers_whose_input_is_read_are_segments_of_their_own() -> None:
    def apart(gated: tuple[int, ...], *alone: int) -> list[str]:
        return [segment.name for segment in plan_segments(LAYERS, gated, alone=alone)]

    assert apart((4,), 3) == ["layers_00-02", "layer_03", "layer_04", "layers_05-09"]
    assert apart((2,), 1) == ["layer_00", "layer_01", "layer_02", "layers_03-09"]
    assert apart((1,), 0) == ["embed", "layer_00", "layer_01", "layers_02-09"]
    assert apart((5, 6), 2) == ["layers_00-01", "layer_02", "layers_03-04", "layer_05", "layer_06", "layers_07-09"]


@given(st.sets(st.integers(1, LAYERS - 1)))
def test_every_policy_has_an_engine_to_run_beside(gated: set[int]) -> None:
    """The policy for layer l reads the input of layer l - 1: the output of the engine before it."""
    segments = plan_segments(LAYERS, sorted(gated), alone=decision_points(sorted(gated), ()))
    assert [layer for segment in segments for layer in segment.layers] == list(range(LAYERS))
    for before, segment in pairwise(segments):
        if segment.gated:
            assert len(before.layers) == 1
            assert not before.embed or segment.first > 1


@given(st.sets(st.integers(1, LAYERS - 1)), st.booleans())
def test_every_layer_once_and_gated_ones_alone(gated: set[int], merge: bool) -> None:
    segments = plan_segments(LAYERS, sorted(gated), merge)
    assert [layer for segment in segments for layer in segment.layers] == list(range(LAYERS))
    assert {segment.first for segment in segments if segment.gated} == gated
    assert all(len(segment.layers) == 1 for segment in segments if segment.gated)
    assert [segment.embed for segment in segments] == [True] + [False] * (len(segments) - 1)
    assert [segment.head for segment in segments] == [False] * (len(segments) - 1) + [True]
    assert len({segment.name for segment in segments}) == len(segments)
    if merge:
        assert not any(not a.gated and not b.gated and b.layers for a, b in pairwise(segments))


def stretches(gated: tuple[int, ...], *read: int) -> tuple[list[str], list[str]]:
    found = plan_stretches(gated, read)
    return tuple([item.name for item in found if item.skips == skips] for skips in (False, True))  # type: ignore[return-value]


def test_stretches_are_of_neighbours_that_are_decided_together() -> None:
    run, skip = stretches(tuple(range(5, 19)), 4)
    assert run == ["layers_05-11", "layers_12-18"]
    assert skip == [f"skips_{layer:02d}-{layer + 1:02d}" for layer in range(5, 18) if layer != 11]
    assert stretches((2, 3, 5), 1) == (["layers_02-03"], ["skips_02-03"])
    assert stretches((2, 4, 6), 1) == ([], [])
    # What decides about later layers is known only when its layer has run.
    assert stretches((2, 3, 4, 5, 6), 1, 4) == (["layers_02-03", "layers_05-06"], ["skips_02-03", "skips_05-06"])
    assert stretches((2, 3, 4), 1, 2, 3) == ([], [])
    assert stretches(()) == ([], [])


@given(st.sets(st.integers(1, 40)), st.sets(st.integers(0, 40)))
def test_every_layer_in_one_stretch_that_runs(gated: set[int], read: set[int]) -> None:
    found = plan_stretches(sorted(gated), read)
    run = [layer for item in found if not item.skips for layer in item.layers]
    assert len(run) == len(set(run))
    free = gated - read
    assert set(run) <= free
    assert all(2 <= len(item.layers) <= LONGEST_STRETCH for item in found if not item.skips)
    pairs = {layer for item in found if not item.skips for layer in list(item.layers)[:-1]}
    assert {item.first for item in found if item.skips} == pairs
    alone = free - set(run)
    assert all(not {layer - 1, layer + 1} & free or len(pairs) >= LONGEST_STRETCH - 1 for layer in alone)
