"""Decode times of processes of their own."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from dash_export import DashRuntime
from dash_export.decision import Setting
from dash_export.errors import BackendError
from dash_export.evaluate.candidates import Candidate
from dash_export.evaluate.timing import BLOCK, FOUND, SETTLE, Timing, in_turns, run_alone
from tests.evaluate.test_score import SETTINGS
from tests.forged import edit
from tests.tiny import random_ids


def test_a_process_takes_what_a_score_takes(runtime: DashRuntime) -> None:
    ids = random_ids(60, seed=5)
    candidate = Candidate(runtime, SETTINGS[2])
    alone = run_alone(candidate, ids.tolist(), 20, Candidate(runtime, Setting("dense")))
    assert 0 < alone.first_seconds < 1
    assert 0.2 < alone.ratio < 5
    assert 1 << 24 < alone.peak_memory < 1 << 31
    actions = candidate.session().score(ids, prefix=20).actions[20 + SETTLE :]
    assert len(actions) == BLOCK
    taken = candidate.taken(actions[FOUND:])
    assert alone.predicted == pytest.approx(taken[2])


def test_a_process_takes_no_module_from_the_current_folder(
    runtime: DashRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("dash_export.py", "json.py"):
        (tmp_path / name).write_text("raise SystemExit('pwned')")
    monkeypatch.chdir(tmp_path)
    alone = run_alone(Candidate(runtime, Setting("dense")), [1, 2, 3], 2)
    assert alone.predicted == alone.ratio == 1


def test_a_process_that_fails_or_is_killed(
    runtime: DashRuntime, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = DashRuntime.load(own_bundle, "cpu-fp32")
    (own_bundle / "manifest.json").unlink()
    with pytest.raises(BackendError, match="is not a finished bundle"):
        run_alone(Candidate(broken, Setting("dense")), [1, 2, 3], 2)
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
    timing = Timing(0.9, 0.88, 0.94, 5.0, 0.8)
    moved = timing.at(0.6)
    assert (moved.ratio, moved.low, moved.high, moved.predicted) == pytest.approx((0.8, 0.76, 0.88, 0.6))
    assert moved.milliseconds == pytest.approx(5.0 * 0.8 / 0.9)
    assert Timing(0.99, 0.9, 1.0, 5.0, 0.99).at(0.6).ratio == 0.99


def test_turns() -> None:
    """Everybody once a round, and not always behind the same one."""
    turns = list(in_turns(3, 20))
    rounds = [[variant for number, variant in turns if number == at] for at in range(20)]
    assert all(sorted(each) == [0, 1, 2] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 3
