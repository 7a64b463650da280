"""Breakdown of a token's time: figures of lanes, whose tokens have timestamps (`probe.py`).

All timestamps of a token cost about a microsecond, 0.02 % of a token that takes 5 ms.
"""

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export import __version__
from dash_export.backends.base import MAIN
from dash_export.backends.cuda.engines import DeviceEngines
from dash_export.backends.host.cpus import cpu_name, physical_cores
from dash_export.bundle.records import POLICY
from dash_export.files.artifacts import Progress, no_progress
from dash_export.measure.candidates import Candidate, setting_record
from dash_export.measure.intervals import Interval, median_ratios
from dash_export.measure.probe import DECISION, SAMPLING, WHOLE, Lane, measure
from dash_export.measure.texts import windows
from dash_export.measure.timing import FOUND, fitting_context, run_alone

PARTS = {
    "always": "layers that always run, embedding, head",
    "run": "units that ran",
    "bypass": "bypasses of skipped units",
    "deciding": "decisions on the host",
    "sampling": "sampling and text",
    "host": "other host gaps",
}
"""Parts of a token's time; of engines on a device by its clock. On a CPU damage is an output of the segment before the
first unit: its time is part of that one's."""
BUSY = 0.5
"""Load per core before the profile, above which other work disturbs the timings."""
Spread = dict[str, float]


def spread(values: npt.ArrayLike, scale: float = 1.0) -> Spread:
    """Return mean, percentiles and count of `values * scale`; there must be one value or more."""
    array = np.asarray(values, np.float64).ravel() * scale
    p50, p90, p99 = np.percentile(array, [50, 90, 99]).tolist()
    return {"mean": float(array.mean()), "p50": p50, "p90": p90, "p99": p99, "count": array.size}


def lane_profile(lane: Lane, dense: Lane, ratio: Interval, peak_memory: int) -> dict[str, Any]:
    """Return the figures of one lane for JSON; `dense`: the lane that its bypasses are compared with. `ratio`: its time
    over the first lane's; `layers` run per token; `parts`: microseconds per token, which add up to the whole;
    `peak_memory`: bytes, of a device what is in use after all lanes.
    """
    candidate = lane.candidate
    return {
        "label": candidate.label,
        "build": candidate.build,
        "setting": setting_record(candidate.setting),
        "target": candidate.runtime.build.target,
        "token_ms": spread(lane.wall, 1e-6),
        "ratio": asdict(ratio),
        "layers": spread((lane.actions == 0).sum(axis=1)),
        "parts": {name: spread(values, 1e-3) for name, values in token_parts(lane).items()},
        "segments": segment_times(lane, dense),
        "device": device_times(lane),
        "peak_memory": peak_memory,
    }


def shares(lane: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Return PARTS -> (mean microseconds per token, share of the whole token), from a lane's profile."""
    whole = sum(part["mean"] for part in lane["parts"].values())
    return {name: (part["mean"], part["mean"] / whole) for name, part in lane["parts"].items()}


def token_parts(lane: Lane) -> dict[str, npt.NDArray[np.int64]]:
    took = lane.took
    segments, deciding, sampling = took[:, :DECISION], took[:, DECISION], took[:, SAMPLING]
    bypass = (segments * lane.bypassed).sum(axis=1)
    always = segments[:, ~lane.gated].sum(axis=1)
    run = segments.sum(axis=1) - bypass - always
    host = took[:, WHOLE] - segments.sum(axis=1) - deciding - sampling
    return dict(zip(PARTS, (always, run, bypass, deciding, sampling, host), strict=True))


def segment_times(lane: Lane, dense: Lane) -> list[dict[str, Any]]:
    """Return a row per segment. `unit`: its name, empty for a segment that always runs; `run` and `bypass`:
    microseconds, or None; `skipped`: share of tokens; `owed`: what a skip still takes, as the bypass's median over the
    run's in the lane `dense`; None for another build.
    """

    def times(lane: Lane, segment: int, bypassed: bool) -> Spread | None:
        found = lane.took[lane.bypassed[:, segment] == bypassed, segment]
        return spread(found, 1e-3) if found.size else None

    rows, units, same = [], iter(map(str, lane.units)), lane.candidate.runtime is dense.candidate.runtime
    for index, segment in enumerate(lane.segments):
        bypass, full = times(lane, index, True), times(dense, index, False)
        rows.append(
            {
                "name": segment.name,
                "unit": next(units) if segment.gated else "",
                "run": times(lane, index, False),
                "bypass": bypass,
                "skipped": float(lane.bypassed[:, index].mean()),
                "owed": bypass["p50"] / full["p50"] if bypass and full and same else None,
            }
        )
    return rows


def device_times(lane: Lane) -> list[dict[str, Any]]:
    """Return a row per segment, and one for the policy; none for a CPU. In microseconds, `device`: its own time;
    `host`: of the launch; `gap`: from the end of what it waits for, the segment before.
    """
    if lane.launches is None or lane.policy is None:
        return []
    ends = np.hstack([lane.stamps[:, :1, 0], lane.stamps[:, : len(lane.segments) - 1, 1]])
    gaps, launched = lane.stamps[:, : len(lane.segments), 0] - ends, lane.launches[..., 1] - lane.launches[..., 0]

    def row(name: str, *times: npt.NDArray[np.int64]) -> dict[str, Any]:
        return {"name": name} | dict(
            zip(("device", "host", "gap"), (spread(each, 1e-3) for each in times), strict=True)
        )

    rows = [
        row(segment.name, lane.took[:, place], launched[:, place], gaps[:, place])
        for place, segment in enumerate(lane.segments)
    ]
    if (asked := lane.policy[:, 0] > 0).any():
        begun = lane.policy[:, 0] - ends[:, np.argmax(lane.gated) - 1]
        took = lane.policy[:, 1] - lane.policy[:, 0]
        rows.append(row(POLICY, took[asked], launched[asked, -1], begun[asked]))
    return rows


def conditions(found: dict[str, Any]) -> list[str]:
    """Return lines about a profile: its model, targets and machine; the load before it; what was decoded; and a warning
    if other work disturbed it.
    """
    machine = found["machine"]
    targets = ", ".join(dict.fromkeys(lane["target"] for lane in found["lanes"]))
    lines = [
        f"{found['model']}, {targets}, {machine['cpu']}, {machine['cores']} cores",
        f"load before: {machine['load']:g}",
        "{text}: {rounds} rounds, settings in turn (windows of text: {windows}); each {context} tokens of prompt, then "
        "{tokens} known tokens decoded one by one".format(**found["course"]),
    ]
    if machine["load"] > BUSY * machine["cores"]:
        lines.append("WARNING: other work ran just before. Its share of the processor is in every figure below.")
    return lines


def profile(
    candidates: Sequence[Candidate],
    text: str,
    name: str,
    context: int | None,
    tokens: int,
    rounds: int,
    progress: Progress = no_progress,
    layers: bool = False,
) -> tuple[dict[str, Any], list[Lane]]:
    """Profile the candidates in turn, the first of which is dense, over windows of `text`, called `name`: `context`
    cached tokens (None: those of the build's cost table), then `tokens` timed ones in each round. Return the figures
    for JSON, and a lane per candidate. `layers`: those inside each engine of the first candidate's build, too. Raises
    RequestError for a text or context that does not fit, and BackendError where a backend does not tell of layers.
    """
    first = candidates[0].runtime
    context = fitting_context(candidates, context, FOUND + tokens)
    progress("engines alone", 0, 0)
    alone = first.engines.layer_times(context, rounds * tokens) if layers else []
    parts = windows(first, text, name, rounds, context + FOUND + tokens)
    machine, memory = this_machine(), []
    for number, candidate in enumerate(candidates):
        progress("peak memory", number, len(candidates))  # in a process that only decodes
        on_device = isinstance(candidate.runtime.engines, DeviceEngines)
        memory.append(0 if on_device else run_alone(candidate, parts[0].tolist(), context).peak_memory)
    lanes = measure(candidates, parts, tokens, rounds, progress)
    for number, candidate in enumerate(candidates):
        if isinstance(engines := candidate.runtime.engines, DeviceEngines):
            free, total = engines.device.room()
            memory[number] = total - free
    ratios = median_ratios(np.array([lane.wall.mean(axis=1) for lane in lanes]))
    profiles = [
        lane_profile(lane, lanes[0], ratio, peak) for lane, ratio, peak in zip(lanes, ratios, memory, strict=True)
    ]
    return {
        "model": first.bundle.manifest.model.name,
        "machine": machine,
        "course": {"text": name, "context": context, "tokens": tokens, "windows": len(parts), "rounds": rounds},
        "lanes": profiles,
        "engines": alone,
        "units": {"token_ms": "milliseconds", "parts, segments, layers": "microseconds"},
    }, lanes


def this_machine() -> dict[str, Any]:
    """Return facts of the machine as it is now; `load`: processes that ran or waited, mean over the last minute."""
    return {
        "cpu": cpu_name(),
        "cores": physical_cores(),
        "load": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: found for name in MAIN if (found := getattr(sys.modules.get(name), "__version__", ""))},
        "dash_export": __version__,
    }
