"""The faster precision is taken, and kept by a training that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dash_export.train import precision
from dash_export.train.precision import training_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("half", "full", "chosen"), [(1.0, 2.0, "bfloat16"), (1.1, 1.0, "bfloat16"), (2.0, 1.0, "float32")]
)
def test_the_faster_one(half: float, full: float, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "precision"
    monkeypatch.setattr(precision, "_seconds", {torch.bfloat16: half, torch.float32: full}.__getitem__)
    assert training_precision(CPU, kept) == chosen
    monkeypatch.setattr(precision, "_seconds", {torch.bfloat16: 1.0, torch.float32: 1.0}.__getitem__)
    assert training_precision(CPU, kept) == chosen, "what it began with"
    kept.write_text("cut sh")
    assert training_precision(CPU, kept) == "bfloat16"


def test_on_a_cpu_it_is_tried_out(tmp_path: Path) -> None:
    assert training_precision(CPU, tmp_path / "cpu") in precision.PRECISIONS
    assert training_precision(torch.device("cuda"), tmp_path / "cuda") == "bfloat16"
    assert training_precision(torch.device("cuda"), tmp_path / "cpu") == (tmp_path / "cpu").read_text()
