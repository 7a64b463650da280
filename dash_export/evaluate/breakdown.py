"""Where the time of a token goes: the figures of lanes whose tokens were stamped (`probe.py`), and the machine.

All stamps of a token cost about a microsecond, 0.02 % of one that takes 5 ms.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from dash_export import __version__
from dash_export.artifacts import Progress, no_progress
from dash_export.decision import Setting
from dash_export.evaluate.candidates import Candidate, label, setting_record
from dash_export.evaluate.intervals import Interval, median_ratios
from dash_export.evaluate.probe import DECISION, SAMPLING, SETTLE, WHOLE, Lane, measure
from dash_export.evaluate.score import windows
from dash_export.evaluate.timing import fitting_context, run_alone
from dash_export.runtime import DashRuntime
from dash_export.runtime.cpus import available_memory, cpu_name, physical_cores
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
CACHE_ITEM = 4
"""Bytes: the KV cache is float32."""
BUSY = 0.5
"""From this load per core before we begin on, other work disturbs the timings."""
PASSES, BUFFER = 12, 512 << 20
"""Of a measurement of bandwidth, and bytes that are copied each time: more than a cache holds."""

Spread = dict[str, float]


def spread(values: npt.ArrayLike, scale: float = 1.0) -> Spread:
    """Mean, percentiles and count of `values * scale`, one or more."""
    array = np.asarray(values, np.float64).ravel() * scale
    p50, p90, p99 = np.percentile(array, [50, 90, 99]).tolist()
    return {"mean": float(array.mean()), "p50": p50, "p90": p90, "p99": p99, "count": array.size}


@dataclass(frozen=True)
class LaneProfile:
    """One setting, or another build by its name (`build`). `ratio`: its time as a fraction of the first lane's, over
    rounds; `layers` run per token; `parts` in microseconds per token, their means add up; `segments` as `segment_times`
    gives them; `traffic`: mean bytes per token of engines and cache, bytes per second at the measured speed, and what
    share of the machine's bandwidth (`utilisation`) that is; `peak_memory` in bytes.
    """

    build: str
    setting: Setting
    target: str
    token_ms: Spread
    first_ms: Spread
    ratio: Interval
    layers: Spread
    parts: dict[str, Spread]
    segments: list[dict[str, Any]]
    traffic: dict[str, float]
    peak_memory: int
    samples_ms: list[float]

    @property
    def label(self) -> str:
        return label(self.setting, self.build)

    def shares(self) -> dict[str, tuple[float, float]]:
        """Part -> mean microseconds per token, and their share of all."""
        whole = sum(part["mean"] for part in self.parts.values())
        return {name: (part["mean"], part["mean"] / whole) for name, part in self.parts.items()}


def lane_profile(lane: Lane, dense: Lane, ratio: Interval, bandwidth: float, peak_memory: int) -> LaneProfile:
    """The figures of one lane; `dense` is what its bypasses are compared with."""
    candidate = lane.candidate
    engines, cache = moved_bytes(lane).mean(axis=0).tolist()
    speed = (engines + cache) / (lane.wall.mean() * 1e-9)
    return LaneProfile(
        candidate.build,
        candidate.setting,
        candidate.runtime.build.target,
        spread(lane.wall, 1e-6),
        spread(lane.first, 1e-6),
        ratio,
        spread((lane.actions == 0).sum(axis=1)),
        {name: spread(values, 1e-3) for name, values in token_parts(lane).items()},
        segment_times(lane, dense),
        {"engines": engines, "cache": cache, "per_second": speed, "utilisation": speed / bandwidth},
        peak_memory,
        np.round(lane.wall.ravel() * 1e-6, 4).tolist(),
    )


def token_parts(lane: Lane) -> dict[str, npt.NDArray[np.int64]]:
    """PARTS -> nanoseconds per token [tokens]."""
    took = lane.took
    segments, deciding, sampling = took[:, :DECISION], took[:, DECISION], took[:, SAMPLING]
    bypass = (segments * lane.bypassed).sum(axis=1)
    always = segments[:, ~lane.gated].sum(axis=1)
    run = segments.sum(axis=1) - bypass - always
    host = took[:, WHOLE] - segments.sum(axis=1) - deciding - sampling
    return dict(zip(PARTS, (always, run, bypass, deciding, sampling, host), strict=True))


def segment_times(lane: Lane, dense: Lane) -> list[dict[str, Any]]:
    """A row per segment. `unit`: as it is written, or empty for what always runs; `run` and `bypass` in microseconds or
    None; `skipped` the share of tokens that skipped it; `owed` the bypass's median time as a share of the run's in a
    token that skips nothing: what a skip still takes.
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
        run = sum(build.engines[name].bytes for name in segment.engines(build.engines))
        bypass = build.engines[next(bypasses).bypass].bytes if segment.gated else 0
        rows.append((max(0, run - (table if segment.embed else 0)), bypass))
    found: npt.NDArray[np.int64] = np.array(rows, np.int64).T
    return found


def moved_bytes(lane: Lane) -> npt.NDArray[np.int64]:
    """[tokens, (engines, cache)]: the weights of the engines that ran, and the cache rows that were read (0 to its
    position for a layer that runs) or written (one, for a layer that is skipped).
    """
    model = lane.candidate.runtime.engines.model
    run, bypass = engine_bytes(lane.candidate.runtime)
    layers = np.array([len(segment.layers) for segment in lane.segments])
    rows = np.where(lane.bypassed, 1, lane.positions[:, None] + 2) @ layers
    engines = np.where(lane.bypassed, bypass, run).sum(axis=1)
    return np.stack((engines, rows * 2 * model.num_kv_heads * model.head_dim * CACHE_ITEM), axis=1)


@dataclass(frozen=True)
class Profile:
    """Everything. Dense is the first lane. `course`: `windows` of `text`, each a `context` and the timed `tokens`, in
    so many `rounds`; `stream_bytes_per_second`: the machine's memory bandwidth.
    """

    model: str
    machine: dict[str, Any]
    stream_bytes_per_second: float
    course: dict[str, Any]
    lanes: list[LaneProfile]

    @property
    def title(self) -> str:
        """Model, targets and machine on a line."""
        targets = ", ".join(dict.fromkeys(lane.target for lane in self.lanes))
        return f"{self.model}, {targets}, {self.machine['cpu']}, {self.machine['cores']} cores"

    @property
    def conditions(self) -> list[str]:
        """The machine's state, what was decoded, and a warning where something disturbed."""
        load, stream = self.machine["load"], self.stream_bytes_per_second / 1e9
        lines = [
            f"load before: {load:g}; memory copied at {stream:.1f} GB/s by all cores (bytes read and written)",
            "{text}: {rounds} rounds, settings in turn (windows of text: {windows}); each {context} tokens of prompt, "
            "then {tokens} known tokens decoded one by one".format(**self.course),
        ]
        if load > BUSY * self.machine["cores"]:
            lines.append("WARNING: other work ran just before. Its share of the processor is in every figure below.")
        return lines

    def record(self) -> dict[str, Any]:
        """As it stands in JSON."""
        return asdict(self) | {
            "lanes": [asdict(lane) | {"setting": setting_record(lane.setting)} for lane in self.lanes],
            "units": {"token_ms, first_ms, samples_ms": "milliseconds", "parts, segments": "microseconds"},
        }


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
    machine, bandwidth, memory = this_machine(), stream_bandwidth(), []
    for number, candidate in enumerate(candidates):
        progress("peak memory", number, len(candidates))  # of a process that only decodes
        memory.append(run_alone(candidate, parts[0].tolist(), context).peak_memory)
    lanes = measure(candidates, parts, tokens, rounds, progress)
    ratios = median_ratios(np.array([lane.wall.mean(axis=1) for lane in lanes]))
    profiles = [
        lane_profile(lane, lanes[0], ratio, bandwidth, peak)
        for lane, ratio, peak in zip(lanes, ratios, memory, strict=True)
    ]
    course = {"text": name, "context": context, "tokens": tokens, "windows": len(parts), "rounds": rounds}
    return Profile(first.bundle.manifest.model.name, machine, bandwidth, course, profiles), lanes


def this_machine() -> dict[str, Any]:
    """The machine as it is now; `load`: processes that ran or waited over the last minute."""
    return {
        "cpu": cpu_name(),
        "cores": physical_cores(),
        "load": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "dash_export": __version__,
    }


def stream_bandwidth(size: int = BUFFER) -> float:
    """Bytes per second that all cores together read and write when they copy `size` bytes: the best of several passes.
    numpy lets go of the interpreter lock: one thread per core.
    """
    cores = physical_cores()
    count = min(size, available_memory() // 4) // 8 // cores
    sources, targets = ([np.full(count, value) for _ in range(cores)] for value in (1.0, 0.0))
    seconds = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(PASSES):
            began = perf_counter()
            list(pool.map(np.copyto, targets, sources))
            seconds.append(perf_counter() - began)
    return 2 * 8 * count * cores / min(seconds)
