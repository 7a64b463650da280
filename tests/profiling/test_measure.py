"""The probe changes nothing but the clock, and its parts are the whole."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dash_export import DashRuntime
from dash_export.decision import Action
from dash_export.profiling.bandwidth import Bandwidth
from dash_export.profiling.breakdown import lane_profile, probe_overhead, token_parts
from dash_export.profiling.measure import Lane, Recording
from dash_export.profiling.probe import Probe, What, stamp_cost
from dash_export.profiling.traffic import embedding_bytes, engine_bytes
from dash_export.runtime.decode import BoundStep
from tests.profiling.conftest import CONTEXT, ROUNDS, TOKENS, TRACED
from tests.tiny import random_ids

STREAM = Bandwidth(2e9, 1e9, 1e9, 1e9, 1 << 20, 2)


def test_a_probe_changes_nothing(tiny_runtime: Callable[..., DashRuntime]) -> None:
    runtime = tiny_runtime()
    ids = random_ids(12)
    logits = []
    for probed in (False, True):
        session = runtime.session("token", skipped=1.5)
        session.prefill(ids[:4])
        step = session.decode_step(8)
        assert isinstance(step, BoundStep)
        probe = Probe(step)
        for token in ids[4:].tolist():
            if probed:
                with probe.on(session.rule) as rule:
                    step.decode(token, rule)
                assert len(probe.take())
                assert len(probe.take()) == 0
            else:
                step.decode(token, session.rule)
            logits.append(step.logits.copy())
        step.decode(1, session.rule)
        assert len(probe.take()) == 0
    np.testing.assert_array_equal(logits[:8], logits[8:])


def test_every_launch_has_a_stamp_and_so_has_the_decision(lanes: list[Lane]) -> None:
    for lane in lanes:
        segments = lane.runtime.build.segments
        for token in [*lane.recording.probed.values(), *lane.trace]:
            index, what, began, ended = token.stamps.T
            assert (began[1:] >= ended[:-1]).all()
            assert (ended >= began).all()
            assert token.began <= began[0]
            assert ended[-1] <= token.decoded <= token.ended
            np.testing.assert_array_equal(index[what != What.DECISION], range(len(segments)))
            # Asked once, before the first unit.
            assert index.tolist().index(-1) == [segment.gated for segment in segments].index(True)
            gated = [index for index, segment in enumerate(segments) if segment.gated]
            np.testing.assert_array_equal(index[what == What.BYPASS], np.array(gated)[token.skipped])


def test_the_parts_are_the_wall_time(lanes: list[Lane]) -> None:
    for lane in lanes:
        for tokens in (list(lane.recording.probed.values()), lane.trace):
            parts = token_parts(lane, tokens)
            assert all((values >= 0).all() for values in parts.values())
            walls = [token.ended - token.began for token in tokens]
            np.testing.assert_allclose(np.sum(list(parts.values()), axis=0), walls, rtol=0.03)
        probed = lane.recording.probed.items()
        assert all(token.ended - token.began == lane.recording.wall[where] for where, token in probed)


def test_every_token_is_seen_both_ways(lanes: list[Lane]) -> None:
    for lane in lanes:
        bare = lane.recording.bare
        assert bare.shape == (ROUNDS, TOKENS)
        assert (bare[0::2] != bare[1::2]).all()
        assert lane.recording.wall.min() > 0
        assert lane.recording.first.min() > 0
        assert len(lane.trace) == TRACED
        assert [token.position for token in lane.trace] == [CONTEXT + 2 + at for at in range(TRACED)]


def test_lanes_do_what_their_setting_says(lanes: list[Lane]) -> None:
    dense, static, token, other = lanes
    assert (dense.recording.layers == 6).all()
    assert (static.recording.layers == 4).all()
    assert (token.recording.layers < 6).any()
    assert (token.recording.layers > 3).any()
    np.testing.assert_array_equal(other.recording.actions, dense.recording.actions)


def test_lane_profile(lanes: list[Lane]) -> None:
    dense = lanes[0]
    found = [lane_profile(lane, dense, STREAM, 1e-7, None) for lane in lanes]
    assert [profile.build for profile in found] == ["", "", "", "other"]
    assert found[0].ratio.value == 1.0
    assert [profile.layers.mean for profile in found[:2]] == [6.0, 4.0]
    assert [profile.launches.mean for profile in found] == [4] * 4
    for profile in found:
        assert abs(profile.check.parts - 1) < 0.03
        assert profile.check.overhead is not None
        assert profile.token_ms.count == ROUNDS * TOKENS // 2
        np.testing.assert_allclose(profile.traffic.utilisation * STREAM.stream, profile.traffic.per_second)
        assert [row.name for row in profile.segments] == [s.name for s in dense.runtime.build.segments]
        assert [row.unit for row in profile.segments] == ["", "2-3", "4", ""]
        assert profile.parts["deciding"].mean > 0
    assert found[1].traffic.cache < found[0].traffic.cache
    full, skipped = found[0].segments[1], found[1].segments[1]
    assert (full.skipped, full.bypass, full.owed) == (0.0, None, None)
    assert (skipped.skipped, skipped.run) == (1.0, None)
    assert full.run is not None
    assert skipped.bypass is not None
    assert skipped.owed == skipped.bypass.p50 / full.run.p50


def test_overhead_of_a_probe_that_costs_a_tenth() -> None:
    """Tokens of unequal length, a second round at half the speed: only the probe is left."""
    tokens = np.array([[1000, 3000, 2000, 5000]])
    wall = np.concatenate([tokens, 2 * tokens])
    for number, at in [(0, 1), (0, 3), (1, 0), (1, 2)]:
        wall[number, at] *= 1.1
    overhead = probe_overhead(Recording(wall[:, 0], wall, np.zeros((1, 6, 2), np.int8), []))
    assert overhead is not None
    np.testing.assert_allclose([overhead.value, overhead.low, overhead.high], 0.1, rtol=1e-3)


def test_stamps_cost_little() -> None:
    assert 0 <= stamp_cost() < 1e-4


def test_traffic_by_hand(lanes: list[Lane]) -> None:
    runtime = lanes[0].runtime
    model, sizes = runtime.engines.model, engine_bytes(runtime)
    engines = runtime.build.engines
    row = 2 * model.num_kv_heads * model.head_dim * 4
    dense = np.zeros(6, np.int8)
    table = embedding_bytes(runtime.recipe.weights, model)
    assert table == model.vocab_size * model.hidden_size * 4
    everything = sum(engines[segment.name].bytes for segment in runtime.build.segments) - table
    assert sizes.moved(dense, 9) == (everything, 6 * 11 * row)
    skipping = dense.copy()
    skipping[2:4] = Action.SKIP
    less = engines["layers_02-03"].bytes - engines["bypass_02-03"].bytes
    assert sizes.moved(skipping, 9) == (everything - less, (4 * 11 + 2) * row)
