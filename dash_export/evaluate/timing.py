"""Measured time: variants take turns, round by round, each in a process of its own where weights matter.

An application has a process of its own, too: no other weights are in the CPU's caches, and its memory is its own. But
where weights lie in memory is worth some per cent, and so is what other guests of the machine do at that time. So each
process also decodes densely, with the same engines, in turns of a few tokens. `main` is what such a process runs.
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
from dash_export.decision import DENSE_POSITIONS, Actions, Setting
from dash_export.errors import BackendError, BundleError, RequestError
from dash_export.evaluate.candidates import Candidate
from dash_export.runtime import DashRuntime

TokenIds = npt.NDArray[np.int64]
SETTLE = 32
"""First decoded tokens of a process, not timed: a policy that skips reaches some of its engines late."""
BLOCK, FOUND = 8, 2
"""Tokens of a turn, and the first of them that are not timed: they find the other's weights in the CPU's caches."""
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
    the others are decoded, the same known text for all. Times are fractions of the first candidate's build run densely:
    in the same process, or for another build in the processes of the same round (their median).

    Raises BackendError like `run_alone`.
    """
    from dash_export.evaluate.intervals import median_ratios  # here: a process that only decodes needs no scipy

    seconds, of_dense, predicted = np.zeros((3, len(candidates), len(parts)))
    for number, index in in_turns(len(candidates), len(parts), progress, "decode time"):
        took = run_alone(candidates[index], parts[number].tolist(), context)
        seconds[index, number], of_dense[index, number], predicted[index, number] = (
            took.seconds, took.of_dense, took.predicted
        )  # fmt: skip
    same = [candidate.runtime is candidates[0].runtime for candidate in candidates]
    dense = np.median((seconds / of_dense)[same], axis=0)
    ratios = median_ratios(np.where(np.array(same)[:, None], of_dense * dense, seconds))
    rows = zip(ratios, np.median(seconds, axis=1), predicted.mean(axis=1), strict=True)
    return [Timing(own.value, own.low, own.high, 1e3 * float(each), float(said)) for own, each, said in rows]


@dataclass(frozen=True)
class ProcessFigures:
    """Figures of one process, without its first `SETTLE` tokens where there are more. `seconds`: per token, the median
    of its turns; `of_dense`: the median of each turn's time as a fraction of the dense turn beside it; `predicted`: the
    same by the cost table; `peak_memory`: most resident bytes.
    """

    seconds: float
    of_dense: float
    predicted: float
    peak_memory: int


def run_alone(candidate: Candidate, ids: list[int], context: int, beside_dense: bool = True) -> ProcessFigures:
    """Run one candidate over known tokens in a new process: the first `context` are a prompt, the others are decoded
    one by one, and in turns densely by another session `beside_dense`. Raises BackendError where the process fails or
    is killed (for lack of memory, perhaps).
    """
    runtime = candidate.runtime
    build = str(runtime.bundle.root), runtime.build.target, content_key(asdict(runtime.build))
    order = json.dumps([*build, asdict(candidate.setting), ids, context, beside_dense])
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
    root, target, key, setting, ids, context, beside_dense = json.load(sys.stdin)
    runtime = DashRuntime.load(root, target, verify=False)
    # The key changes with the export, the engines, the costs and the dial.
    if content_key(asdict(runtime.build)) != key:
        raise BundleError(f"{root} was replaced while it was measured: leave it alone, and measure again")
    candidate = Candidate(runtime, Setting(**setting))
    sessions = [candidate.session()]
    if beside_dense and candidate.setting.kind != "dense":
        sessions.append(runtime.session_with(Setting("dense")))
    for session in sessions:
        session.prefill(ids[:context])
    tokens, actions = ids[context:], list[Actions]()
    seconds = np.zeros((len(sessions), len(tokens)))
    for start in range(0, len(tokens), BLOCK):
        turn = range(start, min(start + BLOCK, len(tokens)))
        for index in range(len(sessions)) if start // BLOCK % 2 else reversed(range(len(sessions))):
            for place in turn:
                began = time.perf_counter()
                taken = sessions[index].decode_one(tokens[place])[1]
                seconds[index, place] = time.perf_counter() - began
                actions += [] if index else [taken]
    settle = SETTLE if len(tokens) > SETTLE else 0
    turns = [
        seconds[:, start + FOUND : start + BLOCK].mean(axis=1) for start in range(settle, len(tokens) - FOUND, BLOCK)
    ] or [seconds[:, settle:].mean(axis=1)]
    own, dense = np.array(turns)[:, 0], np.array(turns)[:, -1]
    predicted = candidate.taken(np.array(actions[settle:]))[2]
    figures = ProcessFigures(float(np.median(own)), float(np.median(own / dense)), predicted, peak_memory())
    print(json.dumps(asdict(figures)))


def peak_memory() -> int:
    """Return the most bytes that this process had resident, 0 where there is no Linux. (The figure of getrusage begins
    with the parent's memory at the fork.)
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
