"""The faster precision is taken, and kept by a training that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dash_export.policy import precision
from dash_export.policy.precision import training_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("half", "full", "chosen"), [(1.0, 2.0, "bfloat16"), (1.1, 1.0, "bfloat16"), (2.0, 1.0, "float32")]
)
def test_the_faster_one(half: float, full: float, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_seconds", {torch.bfloat16: half, torch.float32: full}.__getitem__)
    assert training_precision(CPU, tmp_path) == chosen
    monkeypatch.setattr(precision, "_seconds", {torch.bfloat16: full, torch.float32: half}.__getitem__)
    assert training_precision(CPU, tmp_path) == chosen, "what it began with"
    (tmp_path / "precision").write_text("cut sh")
    assert training_precision(CPU, tmp_path) == training_precision(CPU, tmp_path)


def test_on_a_cpu_it_is_tried_out(tmp_path: Path) -> None:
    assert training_precision(CPU, tmp_path) in precision.PRECISIONS
    assert training_precision(torch.device("cuda"), tmp_path / "nothing is written here") == "bfloat16"
