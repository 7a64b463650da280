"""What long work says where there is no terminal."""

import pytest

from dash_export.commands import progress as module
from dash_export.commands.progress import progress_bar


def test_a_line_every_minute(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And every tenth of the work."""
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with progress_bar("train") as said:
        said("reading", 0, 0)
        said("step 400", 400, 1000)
        for step in range(401, 421):
            now += 9.0
            said(f"step {step}", step, 1000)
        now += 600.0
        for step in (1, 2, 100):  # the same again
            now += 1.0
            said(f"step {step}", step, 1000)
        now += 100.0
        for step in (1, 2, 3):  # other work, of minutes a step
            now += 120.0
            said(f"layer {step}", step, 4)
    assert capsys.readouterr().err.splitlines() == [
        "train: reading",
        "train: step 400 (400/1000)",
        "train: step 407 (407/1000, 78 minutes left)",
        "train: step 414 (414/1000, 82 minutes left)",
        "train: step 1 (1/1000, 10007 minutes left)",
        "train: step 100 (100/1000, 90 minutes left)",
        "train: layer 1 (1/4, 11 minutes left)",
        "train: layer 2 (2/4, 6 minutes left)",
        "train: layer 3 (3/4, 3 minutes left)",
    ]
