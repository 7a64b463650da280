"""What long work says where there is no terminal."""

import time

import pytest

from dash_export.commands import progress as module
from dash_export.commands.progress import progress_bar

LEFT = {403: 90, 406: 89, 409: 89, 412: 88, 415: 88, 418: 87}


def test_a_line_every_twenty_seconds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And every tenth of the work."""
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with progress_bar("train") as said:
        said("reading", 0, 0)
        said("step 400", 400, 1000)
        for step in range(401, 421):
            now += 9.0
            said(f"step {step}", step, 1000)
        said("reading", 0, 0)
        said("step 1", 1, 1000)
    assert capsys.readouterr().err.splitlines() == [
        "train: reading",
        "train: step 400 (400/1000)",
        *(f"train: step {step} ({step}/1000, about {left} min left)" for step, left in LEFT.items()),
        *("train: reading", "train: step 1 (1/1000)"),
    ]


def test_a_step_that_goes_on_says_no_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step of a resumed work: nothing is done yet that could be timed."""
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with progress_bar("train") as said:
        for _ in range(3):
            said("step 400", 400, 1000)
            now += 30.0
    assert capsys.readouterr().err.splitlines() == ["train: step 400 (400/1000)"] * 3


def test_one_long_step_is_not_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 0.2)
    with progress_bar("train") as said:
        said("own answers", 3, 100)
        time.sleep(1.5)
    time.sleep(0.6)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: own answers (3/100)"
    assert lines[1:] in (["train: own answers (3/100), still at it"] * count for count in (1, 2, 3))
