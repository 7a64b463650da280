"""One runtime for half an hour: threads whose sessions and batches answer under all settings, are cancelled, left and
forked; each answer is the one that was computed alone beforehand, and memory stays flat.

    dash-export build MODEL -o my.dash --weights fp32
    python tools/attack/soak.py my.dash --minutes 30 --threads 8

fp32, where what decodes together changes no token. Batches take their prompts from a generator, some of them bad ones:
a bad row ends with an error, and is no other row's fault.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
from shared import finish, growth, resident

from dash_export import DashRuntime
from dash_export.core.kinds import Setting
from dash_export.errors import PolicyError
from dash_export.files.resources import resource_folder
from dash_export.runtime import Response, Session

FLAT = 0.02
SETTINGS = (
    Setting("dense"), Setting("static", skipped=1.0), Setting("token", budget=0.85), Setting("token", trade_off=1.5)
)  # fmt: skip
Answer = list[tuple[int, ...]]
"""Whatever a task gives: tokens and the layers that they skipped, in their order."""


@dataclass(frozen=True)
class Task:
    """A request: `bad` is the place in a batch of a prompt that cannot be answered."""

    kind: str
    setting: Setting
    prompts: tuple[tuple[int, ...], ...]
    tokens: int
    stop_at: int
    bad: int


def bits(responses: Any) -> Answer:
    return [(int(each.token), *map(int, np.flatnonzero(each.actions))) for each in responses]


def generate(task: Task, session: Session) -> Answer:
    return bits(session.stream(task.prompts[0], task.tokens))


def cancel(task: Task, session: Session) -> Answer:
    """From another thread: what came before is compared, and what is asked next."""
    answer = list[Response]()
    for number, response in enumerate(session.stream(task.prompts[0], task.tokens)):
        answer.append(response)
        if number == task.stop_at:
            canceller = threading.Thread(target=session.cancel)
            canceller.start()
            canceller.join()
    assert len(answer) <= task.stop_at + 2, "an answer went on after it was cancelled"
    session.reset()
    return bits(answer[: task.stop_at]) + generate(task, session)[: task.stop_at]


def fork(task: Task, session: Session) -> Answer:
    """One beginning, two ends."""
    session.prefill(task.prompts[0])
    twin = session.fork()
    return bits(session.stream(task.prompts[1], task.stop_at)) + bits(twin.stream(task.prompts[2], task.tokens))


KINDS: dict[str, Callable[[Task, Session], Answer]] = {each.__name__: each for each in (generate, cancel, fork)}


def batch(task: Task, runtime: DashRuntime) -> Answer:
    """The rows that were answered, one after the other."""
    rows: dict[int, list[Response]] = {}
    asked = ([-1] if index == task.bad else prompt for index, prompt in enumerate(task.prompts))
    prompts = [each for prompt in asked for each in (prompt, None)]  # None: nothing has come
    for index, response in runtime.batch_with(task.setting, 3).stream(iter(prompts), task.tokens):
        rows.setdefault(index, []).append(response)
    failed = [index for index, row in rows.items() if row[-1].finish_reason == "error"]
    assert failed == [task.bad] * (task.bad < len(task.prompts)), f"rows {failed} failed, and {task.bad} is bad"
    return [bit for index in sorted(rows) if index != task.bad for bit in bits(rows[index])]


def alone(task: Task, runtime: DashRuntime) -> Answer:
    """Return what a task gives when nothing else runs; of a batch, each good row on a session of its own."""
    if task.kind != "batch":
        return KINDS[task.kind](task, runtime.session_with(task.setting))
    good = (prompt for index, prompt in enumerate(task.prompts) if index != task.bad)
    return [bit for prompt in good for bit in bits(runtime.session_with(task.setting).stream(prompt, task.tokens))]


def draw(random: Random, settings: list[Setting], runtime: DashRuntime, text: str) -> Task:
    """A task, small enough for a context of 512 tokens."""
    starts = [random.randrange(len(text) - 500) for _ in range(random.randint(3, 7))]
    prompts = [tuple(runtime.text.encode(text[start : start + 500])[: random.randint(4, 64)]) for start in starts]
    tokens, kind = random.randint(6, 32), random.choice((*KINDS, "batch"))
    bad = random.choice((len(prompts), random.randrange(len(prompts))))
    return Task(kind, random.choice(settings), tuple(prompts), tokens, random.randint(1, min(12, tokens - 2)), bad)


def work(number: int, runtime: DashRuntime, known: list[tuple[Task, Answer]], until: float, done: Counter[str],
         faults: list[str]) -> None:  # fmt: skip
    """Random tasks on sessions that are kept and that serve one after the other."""
    random, sessions = Random(number), dict[Setting, Session]()
    while time.monotonic() < until and len(faults) < 100:
        task, expected = random.choice(known)
        if task.setting not in sessions:
            sessions[task.setting] = runtime.session_with(task.setting)
        session = sessions[task.setting]
        session.reset()
        try:
            answer = batch(task, runtime) if task.kind == "batch" else KINDS[task.kind](task, session)
            if answer != expected:
                faults.append(f"{task.kind}, {task.setting}: {answer}, and alone {expected}")
        except Exception:
            faults.append(f"{task.kind}: {traceback.format_exc()}")
        done[task.kind] += 1


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", default="cpu-fp32", show_default=True)
@click.option("--minutes", default=30.0, show_default=True)
@click.option("--threads", default=8, show_default=True)
@click.option("--tasks", default=120, show_default=True, help="How many different ones.")
def main(bundle: Path, target: str, minutes: float, threads: int, tasks: int) -> None:
    """Answer alone, then all at once."""
    runtime, settings = DashRuntime.load(bundle, target), list[Setting]()
    for setting in SETTINGS:
        with suppress(PolicyError):  # more than this policy gives
            runtime.session_with(setting)
            settings.append(setting)
    text = (resource_folder("calibration") / "prose.txt").read_text(encoding="utf-8")
    random = Random(tasks)
    drawn = [draw(random, settings, runtime, text) for _ in range(tasks)]
    known = [(task, alone(task, runtime)) for task in drawn]
    done, faults, sizes, until = Counter[str](), list[str](), list[float](), time.monotonic() + 60 * minutes
    given = (runtime, known, until, done, faults)
    running = [threading.Thread(target=work, args=(number, *given)) for number in range(threads)]
    for each in running:
        each.start()
    while any(each.is_alive() for each in running):
        time.sleep(0.5)
        sizes.append(resident())
    finish("soak", faults, threads=threads, minutes=minutes, done=done, **growth(sizes, FLAT, faults))


if __name__ == "__main__":
    main()
