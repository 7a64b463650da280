"""Several writers at once: exports, builds and trainings in every pairing, 2, 4 and 8 processes, on one bundle and one
policy file.

    python tools/attack/writers.py --trials 200

In each trial the processes wait for one another and then start within some milliseconds. Afterwards one of them at
least has succeeded; each other one too, or it was refused with an error that says who is writing; what was reported as
done is whole; nothing is left behind; and each of the commands, run alone, succeeds. What a trial begins with follows
from its number: `--first` goes on after an earlier run, `--only` names pairings.
"""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from random import Random
from threading import BrokenBarrierError
from typing import Any

import click
from shared import (
    BUNDLE,
    FORK,
    PATIENCE,
    POLICY,
    Command,
    Fault,
    Outcome,
    Report,
    Stage,
    chosen,
    outcome,
    staged,
    start,
)
from states import build_state, bundle_state, leftovers, policy_state

PAIRINGS = {
    "export + export, one policy": ("export a",),
    "export + export, two policies": ("export a", "export b"),
    "build + build, one target": ("build fp32",),
    "build + build, two targets": ("build fp32", "build int8"),
    "export + build": ("export b", "build fp32"),
    "train + train, one seed": ("train a",),
    "train + train, two seeds": ("train a", "train b"),
    "train + export": ("train b", "export trained"),
    "train + build": ("train b", "build fp32"),
    "all three": ("export a", "build fp32", "train b", "export trained", "build int8", "export b", "train a"),
}
PROCESSES = (2, 4, 8)
LATEST = 0.03
"""Seconds by which a process starts after the first."""


@click.command()
@click.option("--trials", default=200, show_default=True, help="Of each pairing.")
@click.option("--first", default=0, show_default=True, help="The number of the first one.")
@click.option("--seconds", type=float, help="Begin no further trial after so long.")
@click.option("--only", multiple=True, help="A pairing; repeatable.")
def main(trials: int, first: int, seconds: float | None, only: tuple[str, ...]) -> None:
    """Try every pairing."""
    report = Report("writers")
    names = chosen(only, PAIRINGS)
    with staged() as stage:
        until = time.monotonic() + (seconds or float("inf"))
        with suppress(KeyboardInterrupt):  # what was tried until then is told
            for number in range(first, first + trials):
                for name in names:
                    if time.monotonic() < until:
                        attempt(name, number, stage, report)
    report.finish()


def attempt(name: str, number: int, stage: Stage, report: Report) -> None:
    began = time.perf_counter()
    random = Random(f"{name} {number}")
    folder = stage.folder / "trial"
    commands = [Command.parse(text) for text in PAIRINGS[name]]
    prepare(commands, stage, folder, random)
    count = random.choice(PROCESSES)
    started = [commands[index % len(commands)] for index in range(count)]
    random.shuffle(started)
    ended, faults = at_once(started, stage, folder, random)
    faults += judged(ended, stage, folder) + leftovers(folder)
    for command in commands:
        again = outcome(command, stage, folder)
        if again.error:
            faults.append(Fault(f"alone, the next {command} fails", again.error))
        else:
            faults += [Fault(f"alone, then: {fault.kind}", fault.detail) for fault in judged([again], stage, folder)]
    faults += [Fault(f"alone, then {fault.kind}", fault.detail) for fault in leftovers(folder)]
    shutil.rmtree(folder)
    done, busy = sum(not each.error for each in ended), sum(each.busy for each in ended)
    seconds = time.perf_counter() - began
    report.add(name, number, seconds, faults, started=count, succeeded=done, busy=busy)


def prepare(commands: list[Command], stage: Stage, folder: Path, random: Random) -> None:
    """What the writers find: nothing, or what others can be made from or be written over."""
    folder.mkdir()
    builds = any(command.kind == "build" for command in commands)
    if builds or random.random() < 0.5:
        shutil.copytree(stage.bundle("a"), folder / BUNDLE)
        if random.random() < 0.5:
            shutil.rmtree(folder / BUNDLE / "engines")
    if any(command.variant == "trained" for command in commands) or random.random() < 0.5:
        for path in stage.policy("a").parent.glob(f"{Path(POLICY).stem}.*"):
            shutil.copy2(path, folder)


def writer(command: Command, stage: Stage, folder: Path, delay: float, barrier: Any, pipe: Connection) -> None:
    barrier.wait(PATIENCE)
    time.sleep(delay)
    pipe.send(outcome(command, stage, folder))


def at_once(commands: list[Command], stage: Stage, folder: Path, random: Random) -> tuple[list[Outcome], list[Fault]]:
    """How each of the commands ended, and what of it must not be."""
    barrier = FORK.Barrier(len(commands))
    pipes, processes = [], []
    for command in commands:
        ours, theirs = FORK.Pipe(duplex=False)
        processes.append(start(writer, command, stage, folder, random.uniform(0, LATEST), barrier, theirs))
        theirs.close()
        pipes.append(ours)
    ended, faults = [], []
    for command, pipe, process in zip(commands, pipes, processes, strict=True):
        try:
            if not wait_for([pipe], PATIENCE):
                faults.append(Fault(f"{command.kind} hangs"))
                process.kill()
                continue
            ended.append(pipe.recv())
        except (EOFError, BrokenBarrierError):
            faults.append(Fault(f"{command.kind} died", f"exit code {process.exitcode}"))
        process.join(PATIENCE)
    faults += [each.fault() for each in ended if each.error and not each.busy]
    if all(each.error for each in ended):
        faults.append(Fault("nobody succeeded"))
    return ended, faults


def judged(ended: list[Outcome], stage: Stage, folder: Path) -> list[Fault]:
    """What is wrong with what was reported as done."""
    faults = []
    done = {kind: [each for each in ended if each.command.kind == kind and not each.error] for kind in KINDS}
    if done["export"]:
        state = bundle_state(stage, folder)
        if isinstance(state, Fault):
            faults.append(state)
        elif state == "unfinished" or _key(folder) not in {each.key for each in done["export"]}:
            faults.append(Fault("no bundle that was reported as exported", state))
    for each in {each.command: each for each in done["build"]}.values():
        built = build_state(stage, folder, each.command.variant)
        # Another policy may have been exported since: its bundle keeps the engines, and says whose they are.
        if built == "stale" and any(other.key != each.key for other in done["export"]):
            continue
        if built != "whole":
            faults.append(built if isinstance(built, Fault) else Fault(f"a build reported as done is {built}"))
    if done["train"]:
        trained = policy_state(stage, folder)
        if isinstance(trained, Fault):
            faults.append(trained)
        elif trained not in {each.command.variant for each in done["train"]}:
            faults.append(Fault("no policy that was reported as trained", trained))
    return faults


KINDS = ("export", "build", "train")


def _key(folder: Path) -> str:
    from dash_export.bundle.bundle import Bundle

    return Bundle.open(folder / BUNDLE).manifest.key


if __name__ == "__main__":
    main()
