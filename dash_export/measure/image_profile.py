"""Where the time of a picture goes in an encoder: each segment and each exit, in its place, beside whole passes."""

from __future__ import annotations

from time import perf_counter
from typing import Any

from dash_export.backends.base import Launch, backend_errors
from dash_export.bundle.records import POLICY
from dash_export.files.artifacts import Progress, no_progress
from dash_export.measure.breakdown import Spread, spread, this_machine
from dash_export.runtime import DashRuntime

BATCHES = (1, 8)
WARM_UP = 3


@backend_errors
def _timed(launch: Launch) -> float:
    began = perf_counter()
    launch()
    return perf_counter() - began


def image_profile(runtime: DashRuntime, rounds: int, progress: Progress = no_progress) -> dict[str, Any]:
    """Return for JSON, for 1 and 8 pictures together: milliseconds a picture of dense passes, microseconds a picture of
    each segment, exit and the policy; and of dense, what all segments take together.
    """
    encoder, machine, batches = runtime.encoder(), this_machine(), list[dict[str, Any]]()
    for size in BATCHES:
        _, bound, _ = encoder.engines.timed(0, size)
        pixels = encoder.engines.model.example(size)
        whole, run = list[float](), {name: list[float]() for name, _, _ in bound}
        exits = {name: list[float]() for name, _, bypass in bound if bypass is not None}
        for number in range(WARM_UP + rounds):
            progress(f"{size} at a time", number, WARM_UP + rounds)
            whole.append(encoder.encode(pixels).seconds)
            for name, launch, bypass in bound:
                if bypass is not None:  # an exit is asked before its segment runs
                    exits[name].append(_timed(bypass))
                run[name].append(_timed(launch))

        def each(times: list[float], scale: float, size: int = size) -> Spread:
            return spread(times[WARM_UP:], scale / size)

        rows: list[dict[str, Any]] = [
            {"name": name, "run": each(times, 1e6), "exit": each(exits[name], 1e6) if name in exits else None}
            for name, times in run.items()
        ]
        gone = sum(row["run"]["p50"] for row in rows if row["name"] != POLICY) / 1e3
        dense = each(whole, 1e3)
        batches.append({"size": size, "picture_ms": dense, "together": gone / dense["p50"], "segments": rows})
    return {
        "model": runtime.bundle.manifest.model.name,
        "target": runtime.build.target,
        "machine": machine,
        "rounds": rounds,
        "batches": batches,
    }
