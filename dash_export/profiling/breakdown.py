"""From stamps to figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dash_export.profiling.bandwidth import Bandwidth
from dash_export.profiling.measure import SETTLE, Lane, Recording, TokenStamps
from dash_export.profiling.probe import What
from dash_export.profiling.results import PARTS, Check, LaneProfile, SegmentTimes, Traffic
from dash_export.profiling.statistics import Middle, Spread, middle, spread
from dash_export.profiling.traffic import engine_bytes

US, MS = 1e-3, 1e-6
"""From nanoseconds."""


def lane_profile(
    lane: Lane, dense: Lane, bandwidth: Bandwidth, stamp_seconds: float, memory: int | None
) -> LaneProfile:
    """The figures of one lane; `dense` is what its times are divided by."""
    recording = lane.recording
    bare = recording.wall[recording.bare]
    tokens = list(recording.probed.values())
    parts = token_parts(lane, tokens)
    token_ms = _spread(bare, MS)
    stamps = float(np.mean([len(token.stamps) for token in tokens])) * stamp_seconds * 1e3 / token_ms.p50
    return LaneProfile(
        lane.entrant.build,
        lane.entrant.setting,
        lane.runtime.build.target,
        token_ms,
        _spread(recording.first, MS),
        _ratio(recording, dense.recording),
        _spread(recording.layers),
        _spread([len(token.stamps) - 1 for token in tokens]),
        {name: _spread(values, US) for name, values in parts.items()},
        segment_times(lane, tokens, dense),
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
        segment, what, began, ended = token.stamps.T
        took = ended - began
        ran = what == What.RUN
        parts["always"][number] = took[ran & ~gated[segment]].sum()
        parts["run"][number] = took[ran & gated[segment]].sum()
        parts["bypass"][number] = took[what == What.BYPASS].sum()
        parts["deciding"][number] = took[what == What.DECISION].sum()
        parts["sampling"][number] = token.ended - token.decoded
        gaps = began[1:] - ended[:-1]
        parts["host"][number] = gaps.sum() + (began[0] - token.began) + (token.decoded - ended[-1])
    return parts


def segment_times(lane: Lane, tokens: Sequence[TokenStamps], dense: Lane) -> list[SegmentTimes]:
    """One row per segment."""
    rows = []
    same = lane.runtime is dense.runtime
    dense_tokens = list(dense.recording.probed.values())
    unit = -1
    for index, segment in enumerate(lane.runtime.build.segments):
        run, bypass = (_times(tokens, index, what) for what in (What.RUN, What.BYPASS))
        full = _times(dense_tokens, index, What.RUN) if same else None
        unit += segment.gated
        rows.append(
            SegmentTimes(
                segment.name,
                str(lane.units[unit]) if segment.gated else "",
                run,
                bypass,
                float(np.mean([token.skipped[unit] for token in tokens])) if segment.gated else 0.0,
                bypass.p50 / full.p50 if bypass is not None and full is not None else None,
            )
        )
    return rows


def _times(tokens: Sequence[TokenStamps], segment: int, what: What) -> Spread | None:
    stamps = np.concatenate([token.stamps for token in tokens])
    wanted = stamps[(stamps[:, 0] == segment) & (stamps[:, 1] == what)]
    return spread(wanted[:, 3] - wanted[:, 2], US)


def _spread(values: npt.ArrayLike, scale: float = 1.0) -> Spread:
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
