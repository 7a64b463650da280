"""A whole profile: bundles and settings to lanes, the clock, memory, bandwidth, figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dash_export.artifacts import Progress, no_progress
from dash_export.decision import DENSE_POSITIONS, Setting
from dash_export.errors import RequestError
from dash_export.evaluation.frontier import Racer
from dash_export.evaluation.text import windows
from dash_export.evaluation.timing import SETTLE
from dash_export.profiling.bandwidth import measure_bandwidth
from dash_export.profiling.breakdown import lane_profile
from dash_export.profiling.machine import clocks, this_machine
from dash_export.profiling.measure import Lane, measure, replay_of
from dash_export.profiling.memory import setting_memory
from dash_export.profiling.probe import stamp_cost
from dash_export.profiling.results import Course, LaneProfile, Profile


@dataclass(frozen=True)
class Request:
    """`text` to decode, called `name`; `context` cached tokens (None: those of the build's cost table), `tokens` timed
    in each of `rounds` rounds, `traced` more for the trace. `copies`: how often the engines are loaded for it.
    """

    text: str
    name: str
    context: int | None
    tokens: int
    rounds: int
    traced: int
    copies: int


def profile(
    racers: Sequence[Racer], settings: Sequence[Sequence[Setting]], request: Request, progress: Progress = no_progress
) -> tuple[Profile, list[Lane]]:
    """Every racer at each of its settings, the first of which is dense, all in turn. Also the lanes, with their actions
    and traces. Raises RequestError for a text or context that does not fit.
    """
    plain = racers[0].plain
    context = _context(racers, request)
    count = -(-request.rounds // 2)  # rounds come in pairs on one window
    parts = windows(plain, request.text, request.name, count, context + SETTLE + request.tokens)
    machine = this_machine()
    progress("memory bandwidth", 0, 0)
    bandwidth = measure_bandwidth()
    lanes = [
        lane
        for racer, chosen in zip(racers, settings, strict=True)
        for lane in _lanes(racer, chosen, min(request.copies, count), progress)
    ]
    measure(lanes, parts, request.tokens, request.rounds, request.traced, progress)
    after = clocks()
    stamp = stamp_cost()
    shown = [lane for lane in lanes if lane.replays is None]
    memory = _memory(shown, context, request.tokens, progress)
    profiles: list[LaneProfile] = []
    for lane, peak in zip(shown, memory, strict=True):
        dense = next(other for other in shown if other.name == lane.name)
        replay = next((other for other in lanes if other.replays is lane), None)
        profiles.append(lane_profile(lane, dense, replay, bandwidth, stamp, peak))
    course = Course(request.name, context, request.tokens, len(parts), request.rounds, len(shown[0].runtimes))
    return Profile(plain.bundle.manifest.model.name, machine, after, bandwidth, course, profiles), shown


def _context(racers: Sequence[Racer], request: Request) -> int:
    more = request.tokens + SETTLE
    longest = min(racer.plain.engines.model.max_positions for racer in racers)
    context = request.context
    if context is None:
        context = min(racers[0].plain.cost.context, longest - more)
    if context < DENSE_POSITIONS or context + more > longest:
        raise RequestError(
            f"A context of {context} tokens and {more} decoded ones ({SETTLE} of them to settle) do not fit: give at "
            f"least {DENSE_POSITIONS} tokens of context and at most {longest} in all (--context, --tokens)."
        )
    return context


def _lanes(racer: Racer, settings: Sequence[Setting], copies: int, progress: Progress) -> list[Lane]:
    progress("loading", 0, 0)
    loaded = [racer.copy(number) for number in range(copies)]
    lanes = []
    for setting in settings:
        runtimes = [copy[setting.asks_network] for copy in loaded]
        lane = Lane(racer.name, setting, runtimes, [runtime.session_with(setting) for runtime in runtimes])
        lanes.append(lane)
        if setting.asks_network and lane.runtime.dispatch == "fused":
            lanes.append(replay_of(lane, [copy[False] for copy in loaded]))
    return lanes


def _memory(lanes: Sequence[Lane], context: int, tokens: int, progress: Progress) -> list[int | None]:
    """Of each lane; what it skips hardly matters, so that lanes of one runtime share a figure."""
    known: dict[tuple[int, bool], int | None] = {}
    for number, lane in enumerate(lanes):
        key = (id(lane.runtime), lane.setting.asks_network)
        if key not in known:
            progress("peak memory", number, len(lanes))
            runtime = lane.runtime
            known[key] = setting_memory(
                runtime.bundle.root, runtime.build.target, runtime.dispatch, lane.setting, context, tokens
            )
    return [known[id(lane.runtime), lane.setting.asks_network] for lane in lanes]
