"""One runtime for half an hour: threads whose sessions and batches answer under all settings, are cancelled, left,
forked and begun again; each answer is the one that was computed alone beforehand, and memory stays flat.

    dash-export build MODEL -o my.dash --weights fp32
    python tools/attack/soak.py my.dash --minutes 30 --threads 8

fp32, where what decodes together changes no token. A task (what is asked under which setting, and where it is broken
off) follows from its number, so that its answer can be computed alone, on a session of its own, and be compared when
some thread has given it, on a session that served others before. Batches take their prompts from a generator, some of
them bad ones: a row that fails has a last response that says so (`finish_reason` "error") or ends the stream; it is no
other row's fault in either case.

The resident memory is compared after a warm-up: the median of the last third with that of the first.
"""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from dash_export import DashRuntime
from dash_export.decision import Setting
from dash_export.errors import DashError
from dash_export.profiling.memory import resident_bytes
from dash_export.resources import resource_folder
from dash_export.runtime import Response, Sampling, Session

WARM_UP = 0.2
"""Of the time."""
FLAT = 0.02
SETTINGS = (
    Setting("dense"),
    Setting("static", skipped=1.0),
    Setting("static", skipped=4.0),
    Setting("cosine", skipped=2.0),
    Setting("random", skipped=2.0, seed=5),
    Setting("token", budget=0.9),
    Setting("token", budget=0.8),
    Setting("token", budget=0.85, hold=True),
    Setting("token", trade_off=0.3),
    Setting("token", trade_off=1.5),
    Setting("sequence", trade_off=1.0),
)
Answer = list[tuple[int, ...]]
"""Whatever a task gives: tokens, and bits of actions, in their order."""


@dataclass(frozen=True)
class Task:
    """What one number stands for."""

    kind: str
    setting: Setting
    prompts: tuple[tuple[int, ...], ...]
    words: str
    tokens: int
    stop_at: int
    sampling: Sampling
    bad: tuple[int, ...]
    """Which of a batch's prompts cannot be answered."""


@dataclass
class Soak:
    """What the threads share."""

    runtime: DashRuntime
    tasks: list[Task]
    expected: list[Answer]
    until: float
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def thread(self, number: int, seed: int) -> None:
        """Random tasks on sessions that are kept and that serve one after the other."""
        random = Random(f"{seed} {number}")
        sessions: dict[Setting, Session] = {}
        while time.monotonic() < self.until and len(self.faults) < 100:
            index = random.randrange(len(self.tasks))
            task = self.tasks[index]
            if random.random() < 0.1:
                sessions.pop(task.setting, None)
            session = sessions.get(task.setting) or self.runtime.session_with(task.setting)
            sessions[task.setting] = session
            try:
                answer = perform(task, self.runtime, session)
                fault = "" if answer == self.expected[index] else f"task {index} ({task.kind}): {task.setting}"
                fault += _difference(answer, self.expected[index]) if fault else ""
            except Exception:
                fault = f"task {index} ({task.kind}): {traceback.format_exc()}"
            with self.lock:
                self.counts[task.kind] += 1
                self.faults += [fault] if fault else []


def _difference(answer: Answer, expected: Answer) -> str:
    at = next((i for i, (a, b) in enumerate(zip(answer, expected, strict=False)) if a != b), len(answer))
    return f"; item {at} of {len(expected)} is {answer[at : at + 1]}, and was {expected[at : at + 1]} alone"


def perform(task: Task, runtime: DashRuntime, session: Session) -> Answer:
    """Do a task on a session that may have done others."""
    session.reset()
    return KINDS[task.kind](task, runtime, session)


def bits(response: Response) -> tuple[int, ...]:
    """Token and actions."""
    return (int(response.token), *map(int, np.flatnonzero(response.actions)))


def generate(task: Task, _runtime: DashRuntime, session: Session) -> Answer:
    return [bits(each) for each in session.stream(task.prompts[0], task.tokens, task.sampling)]


def go_on(task: Task, _runtime: DashRuntime, session: Session) -> Answer:
    """Two turns of one conversation."""
    turns = (session.stream(prompt, task.tokens, task.sampling) for prompt in task.prompts[:2])
    return [bits(each) for turn in turns for each in turn]


def cancel(task: Task, _runtime: DashRuntime, session: Session) -> Answer:
    """From another thread, too late by some tokens: what came before is compared, and what is asked next."""
    answer = []
    for number, response in enumerate(session.stream(task.prompts[0], task.tokens, task.sampling)):
        if number < task.stop_at:
            answer.append(bits(response))
        if number == task.stop_at:
            canceller = threading.Thread(target=session.cancel)
            canceller.start()
            canceller.join()
    session.reset()
    return answer + generate(task, _runtime, session)[: task.stop_at]


def leave(task: Task, _runtime: DashRuntime, session: Session) -> Answer:
    """Left in the middle, and another prompt after it."""
    answer = []
    stream = session.stream(task.prompts[0], task.tokens, task.sampling)
    for _, response in zip(range(task.stop_at), stream, strict=False):
        answer.append(bits(response))
    return answer + [bits(each) for each in session.stream(task.prompts[1], task.stop_at, task.sampling)]


def fork(task: Task, _runtime: DashRuntime, session: Session) -> Answer:
    """One beginning, two ends."""
    session.prefill(task.prompts[0])
    twin = session.fork()
    answer = [bits(each) for each in session.stream(task.prompts[1], task.stop_at, task.sampling)]
    return answer + [bits(each) for each in twin.stream(task.prompts[2], task.tokens, task.sampling)]


def restart(task: Task, _runtime: DashRuntime, session: Session) -> Answer:
    """A conversation of its own that begins as the one before."""
    session.generate(task.prompts[0], task.stop_at, task.sampling)
    logits = session.restart((*task.prompts[0][:-3], *task.prompts[1]))
    tokens = [(int(logits.argmax()),)]
    for _ in range(task.stop_at):
        logits, actions = session.decode_one(tokens[-1][0])
        tokens.append((int(logits.argmax()), *map(int, np.flatnonzero(actions))))
    return tokens


def score(task: Task, _runtime: DashRuntime, session: Session) -> Answer:
    if not session.rules.foreseeable:
        return []
    scored = session.score((*task.prompts[0], *task.prompts[1]), prefix=8)
    return [tuple(map(int, np.flatnonzero(actions))) for actions in scored.actions] + [
        tuple(map(int, scored.greedy)),
        (round(float(scored.log_likelihoods.mean()) * 1e3),),
    ]


def chat(task: Task, runtime: DashRuntime, session: Session) -> Answer:
    if runtime.text.chat_template is None:
        return []
    messages = [{"role": "user", "content": task.words}]
    said = list(session.chat(messages, task.stop_at, task.sampling))
    messages.append({"role": "assistant", "content": "".join(each.text for each in said)})
    messages.append({"role": "user", "content": "And then?"})
    return [bits(each) for each in (*said, *session.chat(messages, task.stop_at, task.sampling))]


def batch(task: Task, runtime: DashRuntime, _session: Session) -> Answer:
    """Rows in their order, whole ones: each is what it is in another order, or alone."""
    rows: dict[int, list[Response]] = {}
    failed: set[int] = set()
    stream = runtime.batch_with(task.setting, 3).stream(_prompts(task, runtime), task.tokens, task.sampling)
    try:
        for index, response in stream:
            rows.setdefault(index, []).append(response)
            if response.finish_reason == "error":
                assert isinstance(getattr(response, "error", None), (str, DashError)), "an error that says nothing"
                failed.add(index)
    except DashError:  # of the first bad row: those after it are not answered
        assert task.bad, "a batch of good rows failed"
        failed = set(range(len(task.prompts))) - {
            index for index, responses in rows.items() if responses[-1].finish_reason is not None
        }
    assert set(task.bad) <= failed, "a bad row was answered"
    _alone: Answer = []
    for index, prompt in enumerate(task.prompts):
        if index not in failed:
            _alone += [(index,), *map(bits, rows[index])]
    return _alone


def _prompts(task: Task, runtime: DashRuntime) -> Iterator[Any]:
    limit = runtime.bundle.manifest.model.max_positions
    for index, prompt in enumerate(task.prompts):
        if index % 2:
            yield None  # nothing has come
        if index in task.bad:
            yield ([1] * (limit + 1), [-1, 5], [10**9], [])[index % 4]
        else:
            yield prompt


KINDS: dict[str, Callable[[Task, DashRuntime, Session], Answer]] = {
    each.__name__: each for each in (generate, go_on, cancel, leave, fork, restart, score, chat, batch)
}
