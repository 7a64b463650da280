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
import os
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

from dash_export import DashRuntime
from dash_export.commands.tables import print_table
from dash_export.core.kinds import Setting
from dash_export.errors import DashError, PolicyError
from dash_export.files.resources import resource_folder
from dash_export.runtime import Response, Sampling, Session

WARM_UP = 0.2
"""Of the time."""
FLAT = 0.02
KEPT = 4
"""Sessions of a thread. One of each setting would be a gigabyte of caches, and all the warm-up to fill them."""
SETTINGS = (
    Setting("dense"),
    Setting("static", skipped=1.0),
    Setting("static", skipped=4.0),
    Setting("token", budget=0.9),
    Setting("token", budget=0.8),
    Setting("token", budget=0.85, hold=True),
    Setting("token", trade_off=0.3),
    Setting("token", trade_off=1.5),
)
BAD: tuple[list[int], ...] = ([-1, 5], [10**9], [])
"""Token ids that no model knows; an empty list stands for one longer than the context."""
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
            if task.setting not in sessions:
                if len(sessions) == KEPT:
                    del sessions[random.choice(list(sessions))]
                sessions[task.setting] = self.runtime.session_with(task.setting)
            session = sessions[task.setting]
            try:
                answer = perform(task, self.runtime, session)
                fault = _difference(task, answer, self.expected[index])
                fault = fault and f"task {index} ({task.kind}, {task.setting}): {fault}"
            except Exception:
                fault = f"task {index} ({task.kind}): {traceback.format_exc()}"
            with self.lock:
                self.counts[task.kind] += 1
                self.faults += [fault] if fault else []


def _difference(task: Task, answer: Answer, expected: Answer) -> str:
    """Where an answer is other than alone. Of a batch with bad rows fewer rows may have been answered."""
    if answer == expected or (task.bad and set(answer) <= set(expected)):
        return ""
    at = next((i for i, (a, b) in enumerate(zip(answer, expected, strict=False)) if a != b), len(answer))
    return f"item {at} of {len(expected)} is {answer[at : at + 1]}, and alone {expected[at : at + 1]}"


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
    """From another thread: what came before is compared, and what is asked next."""
    answer = []
    number = 0
    for number, response in enumerate(session.stream(task.prompts[0], task.tokens, task.sampling)):
        if number < task.stop_at:
            answer.append(bits(response))
        if number == task.stop_at:
            canceller = threading.Thread(target=session.cancel)
            canceller.start()
            canceller.join()
    assert number <= task.stop_at + 1, f"an answer went on for {number - task.stop_at} tokens after it was cancelled"
    session.reset()
    return answer + generate(task, _runtime, session)[: task.stop_at]


def leave(task: Task, _runtime: DashRuntime, session: Session) -> Answer:
    """Left in the middle, and another prompt after it."""
    stream = session.stream(task.prompts[0], task.tokens, task.sampling)
    answer = [bits(response) for _, response in zip(range(task.stop_at), stream, strict=False)]
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
    tokens: Answer = [(int(logits.argmax()),)]
    for _ in range(task.stop_at):
        logits, actions = session.decode_one(tokens[-1][0])
        tokens.append((int(logits.argmax()), *map(int, np.flatnonzero(actions))))
    return tokens


def score(task: Task, _runtime: DashRuntime, session: Session) -> Answer:
    scored = session.score((*task.prompts[0], *task.prompts[1]), prefix=8)
    return [tuple(map(int, np.flatnonzero(actions))) for actions in scored.actions] + [
        tuple(map(int, scored.greedy)),
        (round(float(scored.log_likelihoods.mean()) * 1e3),),
    ]


def chat(task: Task, _runtime: DashRuntime, session: Session) -> Answer:
    messages = [{"role": "user", "content": task.words}]
    said = list(session.chat(messages, task.stop_at, task.sampling))
    messages.append({"role": "assistant", "content": "".join(each.text for each in said)})
    messages.append({"role": "user", "content": "And then?"})
    return [bits(each) for each in (*said, *session.chat(messages, task.stop_at, task.sampling))]


def batch(task: Task, runtime: DashRuntime, _session: Session) -> Answer:
    """The rows that were answered, each as one item."""
    rows: dict[int, list[Response]] = {}
    stream = runtime.batch_with(task.setting, 3).stream(_prompts(task, runtime), task.tokens, task.sampling)
    try:
        for index, response in stream:
            rows.setdefault(index, []).append(response)
    except DashError:  # a bad row, which ends what has not ended yet
        assert task.bad, "a batch of good rows failed"
        rows = {index: row for index, row in rows.items() if row[-1].finish_reason is not None}
    else:
        assert len(rows) == len(task.prompts), "a row was not answered"
    failed = {index: row[-1] for index, row in rows.items() if row[-1].finish_reason == "error"}
    assert failed.keys() == rows.keys() & set(task.bad), f"rows {sorted(failed)} failed, and {task.bad} are bad"
    assert all(getattr(last, "error", None) for last in failed.values()), "an error that says nothing"
    return [_row(index, rows[index]) for index in sorted(rows.keys() - failed.keys())]


def _row(index: int, responses: list[Response]) -> tuple[int, ...]:
    return (index, *(number for response in responses for number in (*bits(response), -1)))


def alone(task: Task, runtime: DashRuntime) -> Answer:
    """What a task gives when nothing else runs; of a batch, each good row on a session."""
    if task.kind != "batch":
        return perform(task, runtime, runtime.session_with(task.setting))
    return [
        _row(index, list(runtime.session_with(task.setting).stream(prompt, task.tokens, task.sampling)))
        for index, prompt in enumerate(task.prompts)
        if index not in task.bad
    ]


def _prompts(task: Task, runtime: DashRuntime) -> Iterator[Any]:
    limit = runtime.bundle.manifest.model.max_positions
    for index, prompt in enumerate(task.prompts):
        if index % 2:
            yield None  # nothing has come
        if index in task.bad:
            yield BAD[(index + task.stop_at) % len(BAD)] or [1] * (limit + 1)
        else:
            yield prompt


KINDS: dict[str, Callable[[Task, DashRuntime, Session], Answer]] = {
    each.__name__: each for each in (generate, go_on, cancel, leave, fork, restart, score, chat, batch)
}


def draw(random: Random, kinds: list[str], settings: list[Setting], runtime: DashRuntime, text: str) -> Task:
    """A task, small enough for a context of 512 tokens."""
    kind = random.choice(kinds)
    setting = random.choice([each for each in settings if not (kind == "score" and each.hold and each.budget)])
    prompts = []
    for _ in range(random.randint(3, 7)):
        start = random.randrange(len(text) - 500)
        prompts.append(tuple(runtime.text.encode(text[start : start + 500])[: random.randint(4, 64)]))
    tokens = random.randint(6, 32)
    sampling = random.choice((Sampling(), Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=random.randrange(99))))
    bad = tuple(sorted(random.sample(range(len(prompts)), random.choice((0, 0, 1, 2))))) if kind == "batch" else ()
    words = text[(at := random.randrange(len(text) - 100)) : at + random.randint(10, 60)]
    return Task(kind, setting, tuple(prompts), words, tokens, random.randint(1, min(12, tokens - 1)), sampling, bad)


def possible(runtime: DashRuntime) -> tuple[list[str], list[Setting]]:
    """The kinds of tasks and the settings that this bundle can serve."""
    facts = runtime.bundle.manifest
    most = facts.model.num_layers - (len(facts.policy.layers) + 1) // 2
    settings = []
    for setting in (*SETTINGS, Setting("token", max_layers=most), Setting("token", trade_off=0.7, max_layers=most)):
        try:
            runtime.session_with(setting)
            settings.append(setting)
        except PolicyError:
            pass
    return [kind for kind in KINDS if kind != "chat" or runtime.text.template is not None], settings


def resident(process: int | str = "self") -> float:
    """MB of a process in memory; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", default="cpu-fp32", show_default=True)
@click.option("--minutes", default=30.0, show_default=True)
@click.option("--threads", default=8, show_default=True)
@click.option("--tasks", default=120, show_default=True, help="How many different ones.")
@click.option("--seed", default=0, show_default=True)
@click.option("--every", default=2.0, show_default=True, help="Seconds between samples of the memory.")
def main(bundle: Path, target: str, minutes: float, threads: int, tasks: int, seed: int, every: float) -> None:
    """Answer alone, then all at once."""
    runtime = DashRuntime.load(bundle, target)
    kinds, settings = possible(runtime)
    text = (resource_folder("calibration") / "prose.txt").read_text(encoding="utf-8")
    random = Random(seed)
    drawn = [draw(random, kinds, settings, runtime, text) for _ in range(tasks)]
    began = time.monotonic()
    expected = [alone(task, runtime) for task in drawn]
    print(f"{tasks} tasks under {len(settings)} settings, computed alone in {time.monotonic() - began:.0f} s")
    began = time.monotonic()
    soak = Soak(runtime, drawn, expected, began + 60 * minutes)
    running = [threading.Thread(target=soak.thread, args=(number, seed)) for number in range(threads)]
    for each in running:
        each.start()
    samples: list[tuple[float, float]] = []
    while any(each.is_alive() for each in running):
        time.sleep(every)
        samples.append((time.monotonic() - began, resident()))
    report(soak, samples, minutes, threads)


def growth(samples: list[tuple[float, float]], minutes: float, flat: float) -> dict[str, Any]:
    """What the memory (second, MB) did after the warm-up, printed too; `flat`: by what share it may grow."""
    warm = [sample for sample in samples if WARM_UP * 60 * minutes <= sample[0] <= 60 * minutes] or samples
    third = max(1, len(warm) // 3)
    first, last = (median(size for _, size in part) for part in (warm[:third], warm[-third:]))
    grown = last / first - 1 if first else 0.0
    times, sizes = np.array(warm).T
    slope = 60 * float(np.polyfit(times, sizes, 1)[0]) if len(warm) > 2 else 0.0
    print(
        f"Memory after the warm-up: {first:.0f} MB, at the end {last:.0f} MB ({grown:+.2%}, {slope:+.2f} MB a minute)"
    )
    if grown > flat:
        print(f"Memory grew by more than {flat:.0%}.")
    return {
        "sixths": [round(median(sizes[part])) for part in np.array_split(np.arange(len(sizes)), 6) if len(part)],
        "megabytes": [round(first, 1), round(last, 1)],
        "growth": round(grown, 5),
        "mb_per_minute": slope,
        "flat": grown <= flat,
    }


def report(soak: Soak, samples: list[tuple[float, float]], minutes: float, threads: int) -> None:
    """Print the counts, the memory and one JSON line. Exits with 1 on faults."""
    print_table(f"{threads} threads, {minutes:g} minutes", ("task",), ("done",), sorted(soak.counts.items()))
    figures = growth(samples, minutes, FLAT)
    print(*soak.faults[:10], sep="\n")
    done = {"done": dict(soak.counts), "faults": len(soak.faults), "first_faults": soak.faults[:3]}
    print(json.dumps({"attack": "soak", "threads": threads, "minutes": minutes, **done, **figures}))
    raise SystemExit(bool(soak.faults) or not figures["flat"])


if __name__ == "__main__":
    main()
