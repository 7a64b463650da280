"""Measured time: variants take turns, round by round, each in a process of its own where weights matter.

An application has a process of its own, too. Where weights lie in memory is worth some per cent, and so is what other
guests of the machine do. So each process also decodes with the first candidate, which is dense, in turns of a few
tokens. `main` is what such a process runs.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.backends.host.cpus import peak_memory
from dash_export.core.kinds import Setting
from dash_export.core.sampling import TokenIds
from dash_export.core.units import DENSE_POSITIONS, Actions
from dash_export.errors import BackendError, BundleError, RequestError
from dash_export.files.artifacts import Progress, content_key, no_progress
from dash_export.measure.candidates import Candidate
from dash_export.runtime import DashRuntime

SETTLE = 32
"""First decoded tokens of a process, not timed: a policy that skips reaches some of its engines late."""
BLOCK, FOUND = 8, 2
"""Tokens of a turn, and the first of them that are not timed: they find the other's weights in the CPU's caches."""
_PROCESS = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from dash_export.measure.timing import main
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
            f"{DENSE_POSITIONS} tokens of context and at most {longest} in all."
        )
    return context


@dataclass(frozen=True)
class Timing:
    """Mean decode time of a candidate. `ratio`: its time over the first candidate's build run densely; `low` and
    `high`: its bounds over rounds (equal to it where there are too few); `milliseconds` per token; `predicted`: by the
    cost table, of its dense time, for the same tokens; `prompt_ms`: of the whole prompt.
    """

    ratio: float
    low: float
    high: float
    milliseconds: float
    predicted: float
    prompt_ms: float

    def at(self, predicted: float) -> Timing:
        """Return this timing moved to other tokens, for which the cost table predicts `predicted`. A policy skips more
        on some texts than on others, and more tokens are scored than timed. Where hardly anything was skipped, the
        timing stays as it is.
        """
        if 1 - self.predicted < 0.02:
            return self
        scale = (1 - predicted) / (1 - self.predicted)
        ratio, *bounds = (1 - (1 - value) * scale for value in (self.ratio, self.low, self.high))
        low, high = sorted(bounds)  # where asking costs more than is skipped, the scale is negative
        milliseconds = self.milliseconds * ratio / self.ratio
        return replace(self, ratio=ratio, low=low, high=high, milliseconds=milliseconds, predicted=predicted)


def decode_times(
    candidates: Sequence[Candidate], parts: Sequence[TokenIds], context: int, progress: Progress = no_progress
) -> list[Timing]:
    """Time each candidate in a process of its own, one round per part: the part's first `context` tokens are a prompt,
    the others are decoded. Times are fractions of the first candidate's, which is dense and runs in the processes of
    the others. Raises BackendError like `run_alone`.

    A ratio is the mean that the cost table predicts, plus the trimmed mean of the difference from it: a median of
    ratios would leave out what makes the mean, for skips come in clusters.
    """
    from dash_export.measure.intervals import over_rounds  # here: a process that only decodes needs no scipy

    others = candidates[1:] or candidates
    seconds, ratios, predicted, prompts, first_prompts = np.zeros((5, len(others), len(parts)))
    for number, index in in_turns(len(others), len(parts), progress, "decode time"):
        took = run_alone(others[index], parts[number].tolist(), context, candidates[0], number % 2 == 1)
        seconds[index, number], ratios[index, number], predicted[index, number] = (
            took.first_seconds, took.ratio, took.predicted
        )  # fmt: skip
        prompts[index, number], first_prompts[index, number] = took.prompt_seconds
    milliseconds, first_prompt = 1e3 * float(np.median(seconds)), 1e3 * float(np.median(first_prompts))
    timings = list[Timing]()
    for index, said in enumerate(predicted.mean(axis=1).tolist()):
        more, prompt = over_rounds(trimmed, ratios[index] - predicted[index]), 1e3 * float(np.median(prompts[index]))
        ratio = said + more.value
        timings.append(Timing(ratio, said + more.low, said + more.high, milliseconds * ratio, said, prompt))
    return [Timing(1.0, 1.0, 1.0, milliseconds, 1.0, first_prompt), *timings][-len(candidates) :]


@dataclass(frozen=True)
class ProcessFigures:
    """Figures of one process, without its first `SETTLE` tokens where there are more. `first_seconds`: per token of the
    first candidate, the median of its turns; `predicted`: what the cost table predicts for the tokens, as a fraction of
    dense; `ratio`: that, plus how much longer the turns took (`trimmed`), each as a fraction of the first candidate's
    turn beside it; `peak_memory`: most resident bytes; `prompt_seconds`: of the whole prompt, by the candidate and by
    the first one.
    """

    first_seconds: float
    ratio: float
    predicted: float
    peak_memory: int
    prompt_seconds: tuple[float, float]


def run_alone(
    candidate: Candidate, ids: list[int], context: int, first: Candidate | None = None, loaded_last: bool = False
) -> ProcessFigures:
    """Run one candidate over known tokens in a new process, in turns with `first`: the first `context` tokens are a
    prompt, the others are decoded one by one. `loaded_last`: `first` is loaded before the candidate. Raises
    BackendError where the process fails or is killed.
    """
    orders = [
        [str(one.runtime.bundle.root), one.runtime.build.target, content_key(asdict(one.runtime.build)),
         asdict(one.setting)]
        for one in (candidate, first or candidate)
    ]  # fmt: skip
    order = json.dumps([orders, ids, context, loaded_last])
    command = [sys.executable, "-I", "-c", _PROCESS, json.dumps(sys.path)]
    done = subprocess.run(command, input=order, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGKILL:
        raise BackendError("A process that decodes alone was killed: free memory, or give fewer builds.")
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise BackendError(
            f"The process that runs {orders[0][1]} alone failed: {said[-1] if said else done.returncode}."
        )
    return ProcessFigures(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Run one candidate by the order of `run_alone` on standard input, and print its figures as JSON."""
    orders, ids, context, loaded_last = json.load(sys.stdin)
    candidates = list[Candidate]()
    load = cache(partial(DashRuntime.load, verify=False))
    load(*orders[loaded_last][:2])  # what is loaded first lies better in memory
    for root, target, key, setting in orders:
        # The key changes with the export, the engines, the costs and the dial.
        if content_key(asdict(load(root, target).build)) != key:
            raise BundleError(f"{root} was replaced while it was measured: leave it alone, and measure again")
        candidates.append(Candidate(load(root, target), Setting(**setting)))
    sessions = [one.session() for one in (candidates[:1] if orders[0] == orders[1] else candidates)]
    prompts = [0.0] * len(sessions)
    for index in range(len(sessions)) if loaded_last else reversed(range(len(sessions))):
        began = time.perf_counter()
        sessions[index].prefill(ids[:context])
        prompts[index] = time.perf_counter() - began
    tokens, actions = ids[context:], list[Actions]()
    seconds = np.zeros((len(tokens), len(sessions)))
    for start in range(0, len(tokens), BLOCK):
        for index in range(len(sessions)) if start // BLOCK % 2 else reversed(range(len(sessions))):
            for place in range(start, min(start + BLOCK, len(tokens))):
                began = time.perf_counter()
                taken = sessions[index].decode_one(tokens[place])[1]
                seconds[place, index] = time.perf_counter() - began
                actions += [] if index else [taken]
    turns = _timed(seconds).mean(axis=1)
    said = np.array([candidates[0].taken(turn)[2] for turn in _timed(np.array(actions))])
    ratio = said.mean() + trimmed(turns[:, 0] / turns[:, -1] - said)
    figures = ProcessFigures(
        float(np.median(turns[:, -1])), float(ratio), float(said.mean()), peak_memory(), (prompts[0], prompts[-1])
    )
    print(json.dumps(asdict(figures)))


def trimmed(values: npt.NDArray[np.floating[Any]], axis: int = -1) -> Any:
    """Return the mean without the smallest and the largest tenth: turns in which others had the machine. Where the
    clock differs from the cost table, at most a quarter of the mean difference is lost with them, by simulation.
    """
    cut = values.shape[axis] // 10
    return np.sort(values, axis).take(range(cut, values.shape[axis] - cut), axis).mean(axis)


def _timed(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the timed ones of values [tokens, ...], in whole turns after SETTLE tokens; all without a turn."""
    values = values[SETTLE if len(values) > SETTLE else 0 :]
    whole = len(values) // BLOCK * BLOCK
    return values[:whole].reshape(-1, BLOCK, *values.shape[1:])[:, FOUND:] if whole else values[None]
