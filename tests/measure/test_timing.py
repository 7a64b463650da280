"""Decode times of processes of their own."""

import io
import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.core.kinds import Setting
from dash_export.errors import BackendError
from dash_export.measure import timing
from dash_export.measure.candidates import Candidate
from dash_export.measure.timing import (
    BLOCK,
    FOUND,
    SETTLE,
    ProcessFigures,
    Timing,
    decode_times,
    in_turns,
    main,
    run_alone,
)
from dash_export.runtime import Session
from tests.forged import edit
from tests.measure.test_score import SETTINGS
from tests.tiny import random_ids


def test_a_process_takes_what_a_score_takes(
    runtime: DashRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no module from the current folder."""
    for name in ("dash_export.py", "json.py"):
        (tmp_path / name).write_text("raise SystemExit('pwned')")
    monkeypatch.chdir(tmp_path)
    ids = random_ids(60, seed=5)
    candidate = Candidate(runtime, SETTINGS[2])
    alone = run_alone(candidate, ids.tolist(), 20, Candidate(runtime, Setting("dense")))
    assert alone.first_seconds > 0
    assert alone.ratio > 0  # of tokens of 0.1 ms: beside other work it was 0.19
    assert 1 << 24 < alone.peak_memory < 1 << 31
    actions = candidate.session().score(ids, prefix=20).actions[20 + SETTLE :]
    assert len(actions) == BLOCK
    taken = candidate.taken(actions[FOUND:])
    assert alone.predicted == pytest.approx(taken[2])


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_who_is_slower(
    share: float, runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock on which a dense token takes 2 seconds; another one saves a share of what the cost table says, and
    takes half a second more; but the first of each turn, and those that settle, take an hour. The mean counts, however
    skips cluster, and whatever the cost table says. Its prompt takes 9 seconds, dense's takes 5.
    """
    said, asked = list[str](), Candidate(runtime, SETTINGS[2])

    def stop(*_: Any, **given: Any) -> None:
        said.append(given["input"])
        raise BackendError("stop")

    with monkeypatch.context() as stopped:
        stopped.setattr(subprocess, "run", stop)
        with pytest.raises(BackendError, match="stop"):
            run_alone(asked, random_ids(84).tolist(), 20, Candidate(runtime, SETTINGS[0]))
    sound, prefill, now, decoded = Session.decode_one, Session.prefill, [0.0], Counter[Session]()
    monkeypatch.setattr(Session, "__hash__", object.__hash__)

    def slow(self: Session, token: int) -> Any:
        place, decoded[self] = decoded[self], decoded[self] + 1
        done = sound(self, token)
        saved = share * (1 - asked.taken(done[1][None])[2])
        took = 2 * (1 - saved) + 0.5 if self.rules.rule.asks else 2.0
        now[0] += took if place >= SETTLE and place % BLOCK >= FOUND else 3600.0
        return done

    def slow_prompt(self: Session, ids: list[int]) -> Any:
        now[0] += 9.0 if self.rules.rule.asks else 5.0
        return prefill(self, ids)

    monkeypatch.setattr(Session, "decode_one", slow)
    monkeypatch.setattr(Session, "prefill", slow_prompt)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(sys, "stdin", io.StringIO(said[0]))
    main()
    found = json.loads(capsys.readouterr().out)
    assert found["ratio"] == pytest.approx(1 - share * (1 - found["predicted"]) + 0.25)
    assert (found["first_seconds"], 0 < found["predicted"] < 1) == (2.0, True)
    assert found["prompt_seconds"] == [9, 5]


def test_times_are_fractions_of_the_first_candidates(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in the others' processes: it has none of its own, but where there are no others."""
    candidates = [Candidate(runtime, setting) for setting in (Setting("dense"), *SETTINGS[1:3])]
    ran, orders = list[Candidate](), list[bool]()

    def run(candidate: Candidate, _ids: list[int], _context: int, first: Candidate, last: bool) -> ProcessFigures:
        assert first is candidates[0]
        ran.append(candidate)
        orders.append(last)
        return ProcessFigures(0.01, 0.5 if candidate is candidates[1] else 0.8, 0.6, 1, (0.4, 0.3))

    monkeypatch.setattr(timing, "run_alone", run)
    dense, one, other = decode_times(candidates, [random_ids(4)] * 3, 2)
    assert (dense.ratio, dense.milliseconds, dense.predicted) == (1, 10, 1)
    assert (one.ratio, one.milliseconds, one.predicted) == pytest.approx((0.5, 5, 0.6))
    assert (other.ratio, other.milliseconds) == pytest.approx((0.8, 8))
    assert (other.low, other.high) == pytest.approx((0.8, 0.8)), "every round said the same"
    assert (dense.prompt_ms, one.prompt_ms) == pytest.approx((300, 400))
    assert len(ran) == 6
    assert candidates[0] not in ran
    assert orders == [False, False, True, True, False, False], "which is loaded first changes from round to round"
    assert len(decode_times(candidates[:1], [random_ids(4)], 2)) == 1
    assert ran[-1] is candidates[0]


def test_what_of_a_process_is_timed() -> None:
    tokens = np.arange(SETTLE + 2 * BLOCK + 3)
    assert timing._timed(tokens).tolist() == [
        [SETTLE + turn * BLOCK + place for place in range(FOUND, BLOCK)] for turn in range(2)
    ]
    assert timing._timed(tokens[:3]).tolist() == [[0, 1, 2]]


def test_a_process_that_is_killed(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.CompletedProcess([], -signal.SIGKILL, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(BackendError, match="was killed"):
        run_alone(Candidate(runtime, Setting("dense")), [1, 2, 3], 2)


def test_a_process_times_what_was_judged(own_bundle: Path) -> None:
    judged = Candidate(DashRuntime.load(own_bundle, "cpu-fp32"), Setting("dense"))
    edit(own_bundle / "engines/cpu-fp32/build.json", lambda data: data.update(seconds=data["seconds"] + 1))
    with pytest.raises(BackendError, match=r"own\.dash was replaced while it was measured"):
        run_alone(judged, [1, 2, 3], 2)


def test_time_is_moved_to_the_tokens_of_the_quality() -> None:
    timing = Timing(0.9, 0.88, 0.94, 5.0, 0.8, 9.0)
    moved = timing.at(0.6)
    assert (moved.ratio, moved.low, moved.high, moved.predicted) == pytest.approx((0.8, 0.76, 0.88, 0.6))
    assert moved.milliseconds == pytest.approx(5.0 * 0.8 / 0.9)
    assert Timing(0.99, 0.9, 1.0, 5.0, 0.99, 9.0).at(0.6).ratio == 0.99
    dearer = Timing(0.97, 0.95, 0.99, 5.0, 0.97, 9.0).at(1.004)
    assert dearer.low < dearer.ratio < dearer.high


def test_turns() -> None:
    """Everybody once a round, and not always behind the same one."""
    turns = list(in_turns(3, 20))
    rounds = [[variant for number, variant in turns if number == at] for at in range(20)]
    assert all(sorted(each) == [0, 1, 2] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 3
