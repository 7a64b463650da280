"""A whole profile: entrants to lanes, the clock, memory, bandwidth, figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dash_export.artifacts import Progress, no_progress
from dash_export.decision import DENSE_POSITIONS
from dash_export.errors import RequestError
from dash_export.evaluation import alone
from dash_export.evaluation.settings import Entrant, check_same_tokens
from dash_export.evaluation.text import TokenIds, windows
from dash_export.profiling.bandwidth import measure_bandwidth
from dash_export.profiling.breakdown import lane_profile
from dash_export.profiling.machine import clocks, this_machine
from dash_export.profiling.measure import SETTLE, Lane, measure
from dash_export.profiling.probe import stamp_cost
from dash_export.profiling.results import Course, Profile


@dataclass(frozen=True)
class Request:
    """`text` to decode, called `name`; `context` cached tokens (None: those of the build's cost table), `tokens` timed
    in each of `rounds` rounds, `traced` more for the trace.
    """

    text: str
    name: str
    context: int | None
    tokens: int
    rounds: int
    traced: int


def profile(
    entrants: Sequence[Entrant], request: Request, progress: Progress = no_progress
) -> tuple[Profile, list[Lane]]:
    """Every entrant, the first of which is dense, all in turn. Also the lanes, with their actions and traces. Raises
    RequestError for a text or context that does not fit.
    """
    first = entrants[0].runtime
    check_same_tokens([entrant.runtime for entrant in entrants])
    context = _context(entrants, request)
    count = -(-request.rounds // 2)  # rounds come in pairs on one window
    parts = windows(first, request.text, request.name, count, context + SETTLE + request.tokens)
    machine = this_machine()
    progress("memory bandwidth", 0, 0)
    bandwidth = measure_bandwidth()
    lanes = [Lane(entrant) for entrant in entrants]
    measure(lanes, parts, request.tokens, request.rounds, request.traced, progress)
    after = clocks()
    stamp = stamp_cost()
    profiles = []
    for number, lane in enumerate(lanes):
        progress("peak memory", number, len(lanes))
        profiles.append(lane_profile(lane, lanes[0], bandwidth, stamp, _memory(lane.entrant, parts[0], context)))
    course = Course(request.name, context, request.tokens, len(parts), request.rounds)
    return Profile(first.bundle.manifest.model.name, machine, after, bandwidth, course, profiles), lanes


def _context(entrants: Sequence[Entrant], request: Request) -> int:
    more = request.tokens + SETTLE
    longest = min(entrant.runtime.engines.model.max_positions for entrant in entrants)
    context = request.context
    if context is None:
        context = min(entrants[0].runtime.cost.context, longest - more)
    if context < DENSE_POSITIONS or context + more > longest:
        raise RequestError(
            f"A context of {context} tokens and {more} decoded ones ({SETTLE} of them to settle) do not fit: give at "
            f"least {DENSE_POSITIONS} tokens of context and at most {longest} in all (--context, --tokens)."
        )
    return context


def _memory(entrant: Entrant, part: TokenIds, context: int) -> int | None:
    """What a process that only decodes has resident at most; None where it was killed."""
    found = alone.run_alone(entrant, part.tolist(), context)
    return None if found is None else found.peak_memory
