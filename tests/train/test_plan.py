import time

import pytest
import torch

from dash_export.models import Checkpoint
from dash_export.train import EFFORTS, TrainingSettings
from dash_export.train.plan import Plan, training_plan, whole_training_progress

CPU = torch.device("cpu")


def plan(checkpoint: Checkpoint, kind: str = "token", search: bool = True, effort: str = "default") -> Plan:
    return training_plan(checkpoint.spec, TrainingSettings.of(effort), kind, search, 1000, CPU)


def test_stages_are_those_that_the_training_has(checkpoint: Checkpoint) -> None:
    whole = plan(checkpoint)
    assert [*whole.steps] == [
        "own answers", "candidates", "bypasses in closed form", "regression", "tuning", "static order", "held-out text"
    ]  # fmt: skip
    assert whole.steps["tuning"] == 500
    assert "candidates" not in plan(checkpoint, search=False).steps
    assert "candidates" not in plan(checkpoint, effort="quick").steps, "its units are by a rule"
    static = [*plan(checkpoint, "static").passes]
    assert "regression" not in static
    assert static.index("static order") < static.index("tuning")


def test_more_effort_takes_longer(checkpoint: Checkpoint) -> None:
    passes = [sum(plan(checkpoint, effort=effort).passes.values()) for effort in EFFORTS]
    assert passes == sorted(passes)
    assert passes[0] < passes[1] / 5
    said = str(plan(checkpoint))
    assert "GiB of memory" in said
    assert "tuning 500" in said


def test_what_runs_beside_does_not_count(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is that of a quiet machine."""
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda value: (time.sleep(0.2), item(value))[1])
    alone = plan(checkpoint)
    assert alone.pass_seconds < 0.2


def test_progress_is_that_of_the_whole() -> None:
    heard: list[tuple[str, int, int]] = []
    told = whole_training_progress(lambda *said: heard.append(said), {"own answers": 100.0, "tuning": 300.0})
    told("own answers", 1, 2)
    told("further tuning, loss 0.1", 2, 3)
    assert heard == [("own answers, 1 of 2", 50, 400), ("further tuning, loss 0.1, 2 of 3", 300, 400)]
