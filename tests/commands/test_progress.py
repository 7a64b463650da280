"""What long work says where there is no terminal."""

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
