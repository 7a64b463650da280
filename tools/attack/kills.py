"""Kill -9 at random moments of export, build, train and frontier: what lies there is usable, or says that it is not
finished; the same command run again gives the bytes of an undisturbed run, and leaves nothing else.

    python tools/attack/kills.py --trials 300

Every other process is killed from outside after a random time, also while it writes or computes; the others kill
themselves before one of the operations that change what lies there, or make it durable. Now and then the next run is
killed too. A trial follows from its number (but for what the clock decides): `--first` goes on after an earlier run,
`--only` names commands.
"""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path
from random import Random

import click
from scenes import SCENES, Scene, killable
from shared import FORK, PATIENCE, Fault, Report, Stage, chosen, staged, start

KILLED = -signal.SIGKILL


@click.command()
@click.option("--trials", default=300, show_default=True, help="Of all commands together.")
@click.option("--first", default=0, show_default=True, help="The number of the first one.")
@click.option("--seconds", type=float, help="Begin no further trial after so long.")
@click.option("--only", multiple=True, help="A command; repeatable.")
def main(trials: int, first: int, seconds: float | None, only: tuple[str, ...]) -> None:
    """Kill the commands in turn."""
    report = Report("kills")
    with staged() as stage:
        scenes = {name: SCENES[name].rehearsed(stage, name, killable) for name in chosen(only, SCENES)}
        until = time.monotonic() + (seconds or float("inf"))
        for number in range(first, first + trials):
            if time.monotonic() < until:
                name = list(scenes)[number % len(scenes)]
                attempt(name, scenes[name], number, stage, report)
    report.finish()


def attempt(name: str, scene: Scene, number: int, stage: Stage, report: Report, moment: int | None = None) -> None:
    """Kill the command, once or twice, and look; `moment`: once, before that operation."""
    began = time.perf_counter()
    random = Random(f"{name} {number}")
    folder = stage.folder / "trial"
    shutil.copytree(scene.start(stage, name), folder)
    killed, faults = 0, []
    # Which half a trial is of does not follow which command it is.
    by_time = moment is None and number // len(SCENES) % 2 == 0
    for _ in range(random.choice((1, 1, 1, 2)) if moment is None else 1):
        at = 0 if by_time else moment or scene.moment(random)
        code = kill(scene, stage, folder, at, random.uniform(0, scene.seconds) if by_time else 0.0)
        if code not in (0, KILLED):
            faults.append(Fault("a run after a kill fails", f"exit code {code}"))
        killed += code == KILLED
        faults += scene.survived(stage, folder)
    faults += scene.completed(stage, folder)
    shutil.rmtree(folder)
    report.add(name, number, time.perf_counter() - began, faults, killed=killed)


def kill(scene: Scene, stage: Stage, folder: Path, moment: int, seconds: float) -> int:
    """The exit code of a run that is killed before operation number `moment`, or where that is 0 after `seconds`,
    unless it ends before.
    """
    ours, theirs = FORK.Pipe()
    process = start(killable, scene.command, stage, folder, moment, theirs)
    theirs.close()
    ours.recv()  # it begins
    if not moment:
        time.sleep(seconds)
        process.kill()
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        return 1
    return process.exitcode


if __name__ == "__main__":
    main()
