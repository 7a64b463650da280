"""Measured time: variants take turns, round by round, each in a process of its own where weights matter.

An application has a process of its own, too: no other weights are in the CPU's caches, and its memory is its own.
`main` is what such a process runs.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt

from dash_export.artifacts import Progress, content_key, no_progress
from dash_export.decision import DENSE_POSITIONS, Setting
from dash_export.errors import BackendError, BundleError, RequestError
from dash_export.evaluate.candidates import Candidate
from dash_export.runtime import DashRuntime

TokenIds = npt.NDArray[np.int64]
SETTLE = 32
"""First decoded tokens of a process, not timed: a policy that skips reaches some of its engines late."""
BLOCK = 8
_PROCESS = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from dash_export.evaluate.timing import main
main()
"""
"""Run with -I and this process's path: with -m, Python would look for each module in the current folder first."""


def in_turns(variants: int, rounds: int, progress: Progress = no_progress, name: str = "") -> Iterator[tuple[int, int]]:
    """Yield (round, variant), in another order every round, so that no variant always follows the same other one."""
    for number in range(rounds):
        for turn, index in enumerate(Random(number).sample(range(variants), variants)):
            yield number, index
            progress(name, number * variants + turn + 1, rounds * variants)


def fitting_context(candidates: Sequence[Candidate], context: int | None, decoded: int) -> int:
    """Return the number of cached tokens before `decoded` ones: `context`, or with None that of the build's cost table.
    Raises RequestError where context and decoded tokens do not fit.
    """
    longest = min(candidate.runtime.engines.model.max_positions for candidate in candidates)
    if context is None:
        context = max(DENSE_POSITIONS, min(candidates[0].runtime.cost.context, longest - decoded))
    if context < DENSE_POSITIONS or context + decoded > longest:
        raise RequestError(
            f"A context of {context} tokens and {decoded} decoded ones, the first to settle, do not fit: give at least "
            f"{DENSE_POSITIONS} tokens of context and at most {longest} in all (--context, --tokens)."
        )
    return context


@dataclass(frozen=True)
class Timing:
    """Decode time of a candidate. `ratio`: its time as a fraction of the first candidate's; `low` and `high`: bounds of
    the ratio over rounds (both equal to it where there are too few); `milliseconds`: median per token; `predicted`: the
    fraction of its dense time that the build's cost table predicts for the same tokens.
    """

    ratio: float
    low: float
    high: float
    milliseconds: float
    predicted: float

    def at(self, predicted: float) -> Timing:
        """Return this timing moved to other tokens, for which the cost table predicts `predicted`. A policy skips more
        on some texts than on others, and more tokens are scored than timed. Where hardly anything was skipped, the
        timing stays as it is.
        """
        if 1 - self.predicted < 0.02:
            return self
        scale = (1 - predicted) / (1 - self.predicted)
        ratio, low, high = (1 - (1 - value) * scale for value in (self.ratio, self.low, self.high))
        milliseconds = self.milliseconds * ratio / self.ratio
        return replace(self, ratio=ratio, low=low, high=high, milliseconds=milliseconds, predicted=predicted)


def decode_times(
    candidates: Sequence[Candidate], parts: Sequence[TokenIds], context: int, progress: Progress = no_progress
) -> list[Timing]:
    """Time each candidate in a process of its own, one round per part: the part's first `context` tokens are a prompt,
    the others are decoded, the same known text for all. Times are divided by the first candidate's.

    Raises BackendError like `run_alone`.
    """
    from dash_export.evaluate.intervals import median_ratios  # here: a process that only decodes needs no scipy

    seconds, predicted = np.zeros((2, len(candidates), len(parts)))
    for number, index in in_turns(len(candidates), len(parts), progress, "decode time"):
        took = run_alone(candidates[index], parts[number].tolist(), context)
        seconds[index, number], predicted[index, number] = took.seconds, took.predicted
    rows = zip(median_ratios(seconds), np.median(seconds, axis=1), predicted.mean(axis=1), strict=True)
    return [Timing(own.value, own.low, own.high, 1e3 * float(each), float(said)) for own, each, said in rows]


@dataclass(frozen=True)
class ProcessFigures:
    """Figures of one process. `seconds`: per token (median of blocks), without the first `SETTLE` tokens where there
    are more; `predicted`: the fraction of dense that the cost table predicts for the same tokens; `peak_memory`: most
    resident bytes.
    """

    seconds: float
    predicted: float
    peak_memory: int


def run_alone(candidate: Candidate, ids: list[int], context: int) -> ProcessFigures:
    """Run one candidate over known tokens in a new process: the first `context` are a prompt, the others are decoded
    one by one. Raises BackendError where the process fails or is killed (for lack of memory, perhaps).
    """
    runtime = candidate.runtime
    build = str(runtime.bundle.root), runtime.build.target, content_key(asdict(runtime.build))
    order = json.dumps([*build, asdict(candidate.setting), ids, context])
    command = [sys.executable, "-I", "-c", _PROCESS, json.dumps(sys.path)]
    done = subprocess.run(command, input=order, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGKILL:
        raise BackendError("A process that decodes alone was killed: free memory, or give fewer builds.")
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise BackendError(f"The process that runs {build[1]} alone failed: {said[-1] if said else done.returncode}.")
    return ProcessFigures(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Run one candidate by the order of `run_alone` on standard input, and print its figures as JSON."""
    root, target, key, setting, ids, context = json.load(sys.stdin)
    runtime = DashRuntime.load(root, target, verify=False)
    # The key changes with the export, the engines, the costs and the dial.
    if content_key(asdict(runtime.build)) != key:
        raise BundleError(f"{root} was replaced while it was measured: leave it alone, and measure again")
    candidate = Candidate(runtime, Setting(**setting))
    session = candidate.session()
    session.prefill(ids[:context])
    seconds, taken = [], []
    for token in ids[context:]:
        began = time.perf_counter()
        actions = session.decode_one(token)[1]
        seconds.append(time.perf_counter() - began)
        taken.append(actions)
    settle = SETTLE if len(taken) > SETTLE else 0
    blocks = np.array_split(seconds[settle:], max(1, (len(seconds) - settle) // BLOCK))
    middle = float(np.median([block.mean() for block in blocks]))
    predicted = candidate.taken(np.array(taken[settle:]))[2]
    print(json.dumps(asdict(ProcessFigures(middle, predicted, peak_memory()))))


def peak_memory() -> int:
    """Return the most bytes that this process had resident, 0 where there is no Linux. (The figure of getrusage begins
    with the parent's memory at the fork.)
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
