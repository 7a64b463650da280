"""Where the time of a token goes: the figures of lanes whose tokens were stamped (`probe.py`).

All stamps of a token cost about a microsecond, 0.02 % of one that takes 5 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dash_export.artifacts import Progress, no_progress
from dash_export.decision import Setting
from dash_export.evaluate.candidates import Candidate
from dash_export.evaluate.hardware import Bandwidth, Machine, clocks, measure_bandwidth, this_machine
from dash_export.evaluate.intervals import Interval, median_ratios
from dash_export.evaluate.probe import SETTLE, Lane, TokenStamps, What, measure
from dash_export.evaluate.texts import windows
from dash_export.evaluate.timing import fitting_context, run_alone
from dash_export.runtime import DashRuntime
from dash_export.targets import BITS, QUANTISED

PARTS = {
    "always": "layers that always run, embedding, head",
    "run": "units that ran",
    "bypass": "bypasses of skipped units",
    "deciding": "decisions on the host",
    "sampling": "sampling and text",
    "host": "other host gaps",
}
"""The parts of a token's time. The policy's damage is one more output of the first engine: its time is inside that."""
_CACHE_ITEM = 4
"""Bytes: the KV cache is float32."""


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles of `count` times, in the unit the owner says."""

    mean: float
    p50: float
    p90: float
    p99: float
    count: int


def spread(values: npt.ArrayLike, scale: float = 1.0) -> Spread:
    """The spread of `values * scale`, one or more."""
    array = np.asarray(values, np.float64).ravel() * scale
    p50, p90, p99 = np.percentile(array, [50, 90, 99]).tolist()
    return Spread(float(array.mean()), p50, p90, p99, int(array.size))


@dataclass(frozen=True)
class SegmentTimes:
    """One segment. `unit`: as it is written, or empty for what always runs; `run` and `bypass` in microseconds;
    `skipped` the share of tokens that skipped it; `owed` the bypass's median time as a share of the run's in a token
    that skips nothing: what a skip still takes.
    """

    name: str
    unit: str
    run: Spread | None
    bypass: Spread | None
    skipped: float
    owed: float | None


@dataclass(frozen=True)
class Traffic:
    """Mean bytes per token, and what share of the machine's stream bandwidth that is at the measured speed."""

    engines: float
    cache: float
    per_second: float
    utilisation: float


@dataclass(frozen=True)
class LaneProfile:
    """One setting, or another build by its name (`build`). `ratio`: its time as a fraction of the first lane's, over
    rounds; `parts` in microseconds per token, their means add up; `layers` run and `launches` per token.
    """

    build: str
    setting: Setting
    target: str
    token_ms: Spread
    first_ms: Spread
    ratio: Interval
    layers: Spread
    launches: Spread
    parts: dict[str, Spread]
    segments: list[SegmentTimes]
    traffic: Traffic
    peak_memory: int | None
    samples_ms: list[float]


def lane_profile(lane: Lane, dense: Lane, ratio: Interval, bandwidth: Bandwidth, memory: int | None) -> LaneProfile:
    """The figures of one lane; `dense` is what its bypasses are compared with."""
    tokens, wall = lane.tokens, lane.wall
    parts = token_parts(lane)
    engines, cache = moved_bytes(lane).mean(axis=0).tolist()
    per_second = (engines + cache) / (wall.mean() * 1e-9)
    return LaneProfile(
        lane.candidate.build,
        lane.candidate.setting,
        lane.runtime.build.target,
        spread(wall, 1e-6),
        spread(lane.first, 1e-6),
        ratio,
        spread((lane.actions(tokens) == 0).sum(axis=1)),
        spread([len(token.stamps) - 1 for token in tokens]),
        {name: spread(values, 1e-3) for name, values in parts.items()},
        segment_times(lane, dense),
        Traffic(engines, cache, per_second, per_second / bandwidth.stream),
        memory,
        [round(value, 4) for value in (wall.ravel() * 1e-6).tolist()],
    )


def token_parts(lane: Lane) -> dict[str, npt.NDArray[np.float64]]:
    """PARTS -> nanoseconds per token [tokens]."""
    ran, bypass, deciding, sampling, host = np.array([token.parts for token in lane.tokens], np.float64).T
    ungated = [index for index, segment in enumerate(lane.runtime.build.segments) if not segment.gated]
    always = np.array([_took(token, ungated, What.RUN).sum() for token in lane.tokens], np.float64)
    return dict(zip(PARTS, (always, ran - always, bypass, deciding, sampling, host), strict=True))


def _took(token: TokenStamps, segments: Sequence[int], what: What) -> npt.NDArray[np.int64]:
    found = token.stamps[np.isin(token.stamps[:, 0], segments) & (token.stamps[:, 1] == what)]
    took: npt.NDArray[np.int64] = found[:, 3] - found[:, 2]
    return took


def segment_times(lane: Lane, dense: Lane) -> list[SegmentTimes]:
    """One row per segment."""

    def times(lane: Lane, segment: int, what: What) -> Spread | None:
        found = np.concatenate([_took(token, [segment], what) for token in lane.tokens])
        return spread(found, 1e-3) if found.size else None

    rows = []
    gated = [index for index, segment in enumerate(lane.runtime.build.segments) if segment.gated]
    for index, segment in enumerate(lane.runtime.build.segments):
        run, bypass = times(lane, index, What.RUN), times(lane, index, What.BYPASS)
        full = times(dense, index, What.RUN) if lane.runtime is dense.runtime else None
        owed = bypass.p50 / full.p50 if bypass is not None and full is not None else None
        unit, skipped = "", 0.0
        if segment.gated:
            place = gated.index(index)
            unit, skipped = str(lane.units[place]), float(np.mean([token.skipped[place] for token in lane.tokens]))
        rows.append(SegmentTimes(segment.name, unit, run, bypass, skipped, owed))
    return rows


def engine_bytes(runtime: DashRuntime) -> npt.NDArray[np.int64]:
    """Bytes that each engine reads for one token [run or bypass, segments]; of an embedding table one row is read."""
    build, model, weights = runtime.build, runtime.engines.model, runtime.recipe.weights
    bits = float(BITS[weights.embedding])
    if weights.embedding in QUANTISED:
        # A float32 scale per block, and a zero point of the weights' own width.
        bits += (32 + (0 if weights.symmetric else bits)) / weights.block_size
    table = int(model.vocab_size * model.hidden_size * bits / 8)
    bypasses = iter(runtime.bundle.manifest.policy.units)
    rows = []
    for segment in build.segments:
        names = [segment.name] if segment.name in build.engines else segment.graphs
        run = sum(build.engines[name].bytes for name in names) - (table if segment.embed else 0)
        rows.append((max(0, run), build.engines[next(bypasses).bypass].bytes if segment.gated else 0))
    found: npt.NDArray[np.int64] = np.array(rows, np.int64).T
    return found


def moved_bytes(lane: Lane) -> npt.NDArray[np.int64]:
    """[tokens, (engines, cache)]: the weights of the engines that ran, and the cache rows that were read (0 to its
    position for a layer that runs) or written (one, for a layer that is skipped).
    """
    segments, model = lane.runtime.build.segments, lane.runtime.engines.model
    run, bypass = engine_bytes(lane.runtime)
    counts = np.array([len(segment.layers) for segment in segments])
    gated = np.array([segment.gated for segment in segments])
    row = 2 * model.num_kv_heads * model.head_dim * _CACHE_ITEM
    found = []
    for token in lane.tokens:
        skipped = np.zeros(len(segments), np.bool_)
        skipped[gated] = token.skipped
        cached = (counts * np.where(skipped, 1, token.position + 2)).sum()
        found.append((np.where(skipped, bypass, run).sum(), cached * row))
    return np.array(found, np.int64)


@dataclass(frozen=True)
class Plan:
    """What was decoded: `windows` of text, each a context of `context` tokens and `tokens` timed ones, `rounds` in
    all.
    """

    text: str
    context: int
    tokens: int
    windows: int
    rounds: int


@dataclass(frozen=True)
class Profile:
    """Everything. Dense is the first lane. `after_mhz`: clocks when it was over."""

    model: str
    machine: Machine
    after_mhz: tuple[float, ...]
    bandwidth: Bandwidth
    course: Plan
    lanes: list[LaneProfile]


def profile(
    candidates: Sequence[Candidate],
    text: str,
    name: str,
    context: int | None,
    tokens: int,
    rounds: int,
    progress: Progress = no_progress,
) -> tuple[Profile, list[Lane]]:
    """Every candidate, the first of which is dense, all in turn, over windows of `text`, called `name`: `context`
    cached tokens (None: those of the build's cost table), then `tokens` timed ones in each of `rounds` rounds. Also the
    lanes, with what they did. Raises RequestError for a text or context that does not fit.
    """
    first = candidates[0].runtime
    context = fitting_context(candidates, context, SETTLE + tokens)
    parts = windows(first, text, name, rounds, context + SETTLE + tokens)
    machine = this_machine()
    progress("memory bandwidth", 0, 0)
    bandwidth = measure_bandwidth()
    lanes = [Lane(candidate) for candidate in candidates]
    measure(lanes, parts, tokens, rounds, progress)
    after = clocks()
    ratios = median_ratios(np.array([lane.wall.mean(axis=1) for lane in lanes]))
    profiles = []
    for number, (lane, ratio) in enumerate(zip(lanes, ratios, strict=True)):
        progress("peak memory", number, len(lanes))
        # What a process that only decodes has resident at most; None where it was killed.
        alone = run_alone(lane.candidate, parts[0].tolist(), context)
        memory = None if alone is None else alone.peak_memory
        profiles.append(lane_profile(lane, lanes[0], ratio, bandwidth, memory))
    plan = Plan(name, context, tokens, len(parts), rounds)
    return Profile(first.bundle.manifest.model.name, machine, after, bandwidth, plan, profiles), lanes
