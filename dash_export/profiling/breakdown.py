"""From stamps to figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dash_export.decision import Action
from dash_export.evaluation.timing import SETTLE
from dash_export.profiling.bandwidth import Bandwidth
from dash_export.profiling.measure import Lane, Recording, TokenStamps
from dash_export.profiling.probe import Stamps, What
from dash_export.profiling.results import PARTS, Check, LaneProfile, PolicyCost, SegmentTimes, Traffic
from dash_export.profiling.statistics import Middle, Spread, middle, spread
from dash_export.profiling.traffic import engine_bytes

US, MS = 1e-3, 1e-6
"""From nanoseconds."""
NOTHING = Middle(0.0, 0.0, 0.0)


def lane_profile(
    lane: Lane, dense: Lane, replay: Lane | None, bandwidth: Bandwidth, stamp_seconds: float, memory: int | None
) -> LaneProfile:
    """The figures of one lane; `dense` is what its times are divided by, `replay` its repetition without a policy."""
    recording = lane.recording
    bare = recording.wall[recording.bare]
    tokens = list(recording.probed.values())
    parts = token_parts(lane, tokens)
    token_ms, first_ms, layers = spread(bare, MS), spread(recording.first, MS), spread(recording.executed)
    assert token_ms is not None
    assert first_ms is not None
    assert layers is not None
    stamps = float(np.mean([len(token.stamps) for token in tokens])) * stamp_seconds * 1e3 / token_ms.p50
    return LaneProfile(
        lane.name,
        lane.setting,
        lane.runtime.build.target,
        lane.runtime.dispatch,
        token_ms,
        first_ms,
        _ratio(recording, dense.recording),
        layers,
        _spread(np.array([_launches(token) for token in tokens]), 1.0),
        {name: _spread(values, US) for name, values in parts.items()},
        spread([_deciding(token) for token in lane.trace], US),
        segment_times(lane, tokens),
        _policy_cost(lane, parts["policy"], replay),
        _traffic(lane, bandwidth),
        memory,
        _check(recording, np.sum(list(parts.values()), axis=0), stamps),
        [round(value, 4) for value in (bare * MS).tolist()],
    )


def token_parts(lane: Lane, tokens: Sequence[TokenStamps]) -> dict[str, npt.NDArray[np.float64]]:
    """PARTS -> nanoseconds per token [tokens]. Gaps are measured between stamps, not what is left of the wall time."""
    gated = np.array([segment.gated for segment in lane.runtime.build.segments])
    parts = {name: np.zeros(len(tokens)) for name in PARTS}
    for number, token in enumerate(tokens):
        stamps = by_segment(token.stamps)
        segment, _, what, began, ended = stamps[stamps[:, 2] != What.DECISION].T
        took = ended - began
        ran = what == What.RUN
        parts["always"][number] = took[ran & ~gated[segment]].sum()
        parts["run"][number] = took[ran & gated[segment]].sum()
        for name, kind in (("skip", What.SKIP), ("policy", What.POLICY)):
            parts[name][number] = took[what == kind].sum()
        parts["sampling"][number] = token.ended - token.decoded
        gaps = began[1:] - ended[:-1]
        parts["host"][number] = gaps.sum() + (began[0] - token.began) + (token.decoded - ended[-1])
    return parts


def by_segment(stamps: Stamps) -> Stamps:
    """With the time of a stretch divided evenly among its segments: its layers are all alike."""
    counts = stamps[:, 1]
    found = np.repeat(stamps, counts, axis=0)
    place = np.arange(len(found)) - np.repeat(np.cumsum(counts) - counts, counts)
    took, count = found[:, 4] - found[:, 3], found[:, 1].copy()
    found[:, 4] = found[:, 3] + took * (place + 1) // count
    found[:, 3] += took * place // count
    found[:, 0] += place
    found[:, 1] = 1
    return found


def segment_times(lane: Lane, tokens: Sequence[TokenStamps]) -> list[SegmentTimes]:
    """One row per segment."""
    stamps = by_segment(np.concatenate([token.stamps for token in tokens]))
    took = stamps[:, 4] - stamps[:, 3]

    def times(index: int, what: What) -> Spread | None:
        return spread(took[(stamps[:, 0] == index) & (stamps[:, 2] == what)], US)

    return [
        SegmentTimes(
            segment.name,
            segment.first if segment.gated else -1,
            times(index, What.RUN),
            times(index, What.SKIP),
            times(index, What.POLICY),
            float(np.mean([token.actions[segment.first] == Action.SKIP for token in tokens])) if segment.gated else 0.0,
        )
        for index, segment in enumerate(lane.runtime.build.segments)
    ]


def _launches(token: TokenStamps) -> int:
    """Of layers: policies that are engines of their own are not among them."""
    return int(np.isin(token.stamps[:, 2], (What.RUN, What.SKIP)).sum())


def _deciding(token: TokenStamps) -> int:
    """Nanoseconds in which the host asked the rule."""
    rows = token.stamps[token.stamps[:, 2] == What.DECISION]
    return int((rows[:, 4] - rows[:, 3]).sum())


def _spread(values: npt.NDArray[np.float64], scale: float) -> Spread:
    found = spread(values, scale)
    assert found is not None
    return found


def _ratio(recording: Recording, dense: Recording) -> Middle:
    """Round by round against dense: what drifts with the machine cancels. Median and quartiles."""
    ratios = recording.wall.mean(axis=1) / dense.wall.mean(axis=1)
    low, value, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    return Middle(value, low, high)


def _check(recording: Recording, sums: npt.NDArray[np.float64], stamps: float) -> Check:
    walls = np.array([recording.wall[where] for where in recording.probed], np.float64)
    share = float(sums.sum() / walls.sum())
    overhead = probe_overhead(recording)
    bare = (
        None if overhead is None else Middle(*(share * (1 + x) for x in (overhead.value, overhead.low, overhead.high)))
    )
    return Check(share, bare, overhead, stamps)


def probe_overhead(recording: Recording) -> Middle | None:
    """What the probe adds, as a fraction of a token's time. A token is probed in one round of a pair and bare in the
    other, its neighbour the other way round: in half the difference of their log ratios, what a token costs and what
    changed between the rounds cancel.
    """
    last = len(recording.wall) // 2 * 2
    even, odd = recording.wall[0:last:2], recording.wall[1:last:2]
    ratios = np.log(even / odd)
    count = ratios.shape[1] // 2 * 2
    # In even rounds the odd tokens are probed.
    found = middle((ratios[:, 1:count:2] - ratios[:, 0:count:2]) / 2)
    return None if found is None else Middle(*np.expm1([found.value, found.low, found.high]).tolist())


def _policy_cost(lane: Lane, launches: npt.NDArray[np.float64], replay: Lane | None) -> PolicyCost:
    if not lane.setting.asks_network:
        return PolicyCost("none", NOTHING)
    if replay is None:
        return PolicyCost("launches", middle(launches * US) or NOTHING)
    # Same tokens, same actions, same probe: what differs is the policy inside the engines.
    recording = lane.recording
    difference = (recording.wall - replay.recording.wall) * US
    copies = [middle(difference[recording.copy(number)]) for number in range(recording.copies)]
    found = [one for one in copies if one is not None]
    # Tokens agree better than copies do: the bounds are the widest of any copy.
    low, high = min(one.low for one in found), max(one.high for one in found)
    return PolicyCost("difference", Middle(float(np.mean([one.value for one in found])), low, high))


def _traffic(lane: Lane, bandwidth: Bandwidth) -> Traffic:
    bytes_, recording = engine_bytes(lane.runtime), lane.recording
    first = min(token.position for token in recording.probed.values()) - min(where[1] for where in recording.probed)
    moved = np.array(
        [
            bytes_.moved(actions, first + at)
            for window in recording.actions
            for at, actions in enumerate(window[SETTLE:])
        ],
        np.float64,
    )
    engines, cache = moved.mean(axis=0).tolist()
    per_second = (engines + cache) / (float(recording.wall[recording.bare].mean()) * 1e-9)
    return Traffic(engines, cache, per_second, per_second / bandwidth.stream)
