"""The probe changes nothing but the clock, and its parts are the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.decision import Action, Setting
from dash_export.evaluation.text import windows
from dash_export.profiling.bandwidth import Bandwidth
from dash_export.profiling.breakdown import by_segment, lane_profile, probe_overhead, token_parts
from dash_export.profiling.measure import Lane, Recording, measure, replay_of
from dash_export.profiling.probe import Probe, What, stamp_cost
from dash_export.profiling.trace import chrome_trace
from dash_export.profiling.wording import rarely_line, stretches_line
from dash_export.runtime.backends.onnxruntime import OrtBackend
from tests.profiling.conftest import CONTEXT, ROUNDS, TEXT, TOKENS, TRACED
from tests.tiny import random_ids

STREAM = Bandwidth(2e9, 1e9, 1e9, 1e9, 1 << 20, 2)


def test_a_probe_changes_nothing(tiny_runtime: Callable[..., DashRuntime]) -> None:
    runtime = tiny_runtime(dispatch="sync")
    ids = random_ids(12)
    logits = []
    for probed in (False, True):
        session = runtime.session("token", skipped=1.5)
        session.prefill(ids[:4])
        step = session.decode_step(8)
        probe = Probe(step)
        before = step.segments
        for token in ids[4:].tolist():
            if probed:
                with probe.on(session.rule) as rule:
                    step.decode(token, rule)
                assert len(probe.take())
                assert len(probe.take()) == 0
            else:
                step.decode(token, session.rule)
            logits.append(step.logits.copy())
        assert step.segments is before
    np.testing.assert_array_equal(logits[:8], logits[8:])


def test_every_launch_and_decision_has_a_stamp(lanes: list[Lane]) -> None:
    for lane in lanes:
        segments = lane.runtime.build.segments
        gated = [index for index, segment in enumerate(segments) if segment.gated]
        for token in lane.recording.probed.values():
            index, count, what, began, ended = token.stamps.T
            assert (count == 1).all()
            assert (began[1:] >= ended[:-1]).all()
            assert (ended >= began).all()
            assert token.began <= began[0]
            assert ended[-1] <= token.decoded <= token.ended
            launched = (what == What.RUN) | (what == What.SKIP)
            np.testing.assert_array_equal(index[launched], range(len(segments)))
            assert not (what == What.DECISION).any()
            asked = gated if lane.runtime.dispatch == "sync" else []
            np.testing.assert_array_equal(index[what == What.POLICY], asked)
            skipped = [segments[where].first for where in index[what == What.SKIP]]
            np.testing.assert_array_equal(np.flatnonzero(token.actions == Action.SKIP), skipped)


def test_a_trace_has_the_decisions_too(lanes: list[Lane]) -> None:
    for lane in lanes:
        gated = [index for index, segment in enumerate(lane.runtime.build.segments) if segment.gated]
        for token in lane.trace:
            index, _, what, *_ = token.stamps.T
            np.testing.assert_array_equal(index[what == What.DECISION], gated)


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


def test_a_replay_does_what_its_original_did(lanes: list[Lane]) -> None:
    _, sync, fused, replay = lanes
    assert replay.runtime.dispatch == "plain"
    assert (fused.recording.executed < 6).any()
    for other in (replay, sync):
        np.testing.assert_array_equal(other.recording.actions, fused.recording.actions)
        np.testing.assert_array_equal(other.recording.executed, fused.recording.executed)


def test_lane_profile(lanes: list[Lane]) -> None:
    dense, sync, fused, replay = lanes
    found = [lane_profile(lane, dense, again, STREAM, 1e-7, None) for lane, again in (
        (dense, None), (sync, None), (fused, replay))]  # fmt: skip
    assert [profile.policy.how for profile in found] == ["none", "launches", "difference"]
    assert found[0].ratio.value == 1.0
    assert found[0].layers.mean == 6.0
    assert [profile.launches.mean for profile in found] == [5, 5, 5]
    assert not any(stretches_line(profile) for profile in found)
    assert found[1].parts["policy"].mean > 0
    assert found[2].parts["policy"].mean == 0
    for profile in found:
        assert abs(profile.check.parts - 1) < 0.03
        assert profile.check.overhead is not None
        assert profile.token_ms.count == ROUNDS * TOKENS // 2
        np.testing.assert_allclose(profile.traffic.utilisation * STREAM.stream, profile.traffic.per_second)
        assert [row.name for row in profile.segments] == [s.name for s in dense.runtime.build.segments]
    assert found[2].traffic.cache < found[0].traffic.cache


def test_layers_that_are_rarely_skipped(lanes: list[Lane]) -> None:
    fused = lane_profile(lanes[2], lanes[0], lanes[3], STREAM, 1e-7, None)

    def line(*skipped: float) -> str:
        gated = iter(skipped)
        rows = [replace(row, skipped=next(gated)) if row.layer >= 0 else row for row in fused.segments]
        return rarely_line(replace(fused, segments=rows))

    assert line(0.5, 0.099, 0.2).startswith("skipped for under 10% of the tokens: 3. ")
    assert line(0.5, 0.099, 0.2).endswith("--gated 2,4.")
    assert (line(0.3, 0.2, 0.1), line(0.0, 0.0, 0.0)) == ("", "")
    assert rarely_line(lane_profile(lanes[0], lanes[0], None, STREAM, 0.0, 5)) == ""


def test_overhead_of_a_probe_that_costs_a_tenth() -> None:
    """Tokens of unequal length, a second round at half the speed: only the probe is left."""
    tokens = np.array([[1000, 3000, 2000, 5000]])
    wall = np.concatenate([tokens, 2 * tokens])
    for number, at in [(0, 1), (0, 3), (1, 0), (1, 2)]:
        wall[number, at] *= 1.1
    zeros = np.zeros((2, 4), np.int64)
    overhead = probe_overhead(Recording(zeros[:, 0], wall, zeros, np.zeros((1, 6, 2), np.int8), 1, []))
    assert overhead is not None
    np.testing.assert_allclose([overhead.value, overhead.low, overhead.high], 0.1, rtol=1e-3)


def test_rounds_take_copies_in_turn() -> None:
    zeros = np.zeros((8, 2), np.int64)
    recording = Recording(zeros[:, 0], zeros, zeros, np.zeros((1, 4, 2), np.int8), 2, [])
    assert recording.copy(0).tolist() == [True, True, False, False] * 2
    assert recording.copy(1).tolist() == [False, False, True, True] * 2


def test_stamps_cost_little() -> None:
    assert 0 <= stamp_cost() < 1e-4


def test_traffic_by_hand(lanes: list[Lane]) -> None:
    from dash_export.profiling.traffic import embedding_bytes, engine_bytes

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
    skipping[3] = Action.SKIP
    less = engines["layer_03"].bytes - engines["skip_03"].bytes
    assert sizes.moved(skipping, 9) == (everything - less, (5 * 11 + 1) * row)


def test_what_does_not_ask_costs_no_policy(lanes: list[Lane]) -> None:
    assert not Setting("static", skip=(3,)).asks_network
    assert lane_profile(lanes[0], lanes[0], None, STREAM, 0.0, 5).policy.us.value == 0


@pytest.fixture(scope="module")
def stretched_lanes(stretched_runtime: Callable[[str], DashRuntime]) -> list[Lane]:
    """Dense, the token policy and its replay, where layers next to each other are one launch."""
    plain = stretched_runtime("plain")
    # What a launch costs was measured, and with it the dial: here it costs nothing.
    build = replace(plain.build, cost=replace(plain.cost, launch=0.0))
    fused = DashRuntime(plain.bundle, build, OrtBackend(0), "fused")
    damage = fused.session("token", trade_off=0.0).score(random_ids(60)).damage[2:, list(fused.cost.cost)]
    token = Setting("token", trade_off=2 * float(np.median(damage)) / max(fused.cost.cost.values()))
    found = [
        Lane("stretched", Setting("dense"), [plain], [plain.session("dense")]),
        Lane("stretched", token, [fused], [fused.session_with(token)]),
    ]
    found.append(replay_of(found[-1], [plain]))
    measure(found, windows(plain, TEXT, "text", 2, CONTEXT + 2 + TOKENS), TOKENS, ROUNDS, TRACED)
    return found


def test_a_stretch_is_one_stamp_and_every_layer_has_its_part(stretched_lanes: list[Lane]) -> None:
    for lane in stretched_lanes:
        segments = lane.runtime.build.segments
        tokens = [*lane.recording.probed.values(), *lane.trace]
        assert any((token.stamps[:, 1] > 1).any() for token in tokens)
        for token in tokens:
            rows = by_segment(token.stamps[token.stamps[:, 2] != What.DECISION])
            np.testing.assert_array_equal(rows[:, 0], range(len(segments)))
            skipped = [segments[where].first for where in rows[rows[:, 2] == What.SKIP, 0]]
            np.testing.assert_array_equal(np.flatnonzero(token.actions == Action.SKIP), skipped)
            took = (token.stamps[:, 4] - token.stamps[:, 3])[token.stamps[:, 2] != What.DECISION]
            assert (rows[:, 4] - rows[:, 3]).sum() == took.sum()
            assert (rows[1:, 3] >= rows[:-1, 4]).all()
        parts = token_parts(lane, tokens)
        walls = [token.ended - token.began for token in tokens]
        np.testing.assert_allclose(np.sum(list(parts.values()), axis=0), walls, rtol=0.05)
    dense, fused, replay = stretched_lanes
    assert len(dense.trace[0].stamps) == 5 + 7
    profiles = [lane_profile(lane, dense, replay, STREAM, 1e-7, None) for lane in (dense, fused)]
    assert profiles[0].launches.mean == 5 < profiles[1].launches.mean < len(fused.runtime.build.segments)
    assert profiles[1].decision is not None
    assert stretches_line(profiles[0]).startswith("5.0 launches per token")
    assert not rarely_line(profiles[1])
    names = {event["name"] for event in chrome_trace(stretched_lanes[:2], "x")["traceEvents"]}
    assert {"layers_02-06", "layers_08-09"} <= names
    assert any(name.startswith("skips_") for name in names)


def test_a_span_is_divided_evenly() -> None:
    stamps = np.array([[1, 1, What.RUN, 100, 130], [2, 3, What.SKIP, 140, 150]])
    expected = [[1, 1, 0, 100, 130], [2, 1, 1, 140, 143], [3, 1, 1, 143, 146], [4, 1, 1, 146, 150]]
    assert by_segment(stamps).tolist() == expected
