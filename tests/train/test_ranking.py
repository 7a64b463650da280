"""The greedy order, over damages that are made up."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from dash_export.decision import parse_units
from dash_export.models import Checkpoint
from dash_export.train import ranking
from dash_export.train.gated_model import GatedModel
from dash_export.train.ranking import greedy_order, ranking_work
from dash_export.train.skip_modules import SkipModules
from tests.tiny import tiny_policy


def test_each_adds_least_for_its_size(
    model: GatedModel, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2-3 costs more than 1 alone but less a layer; after it 4 is dearer than alone."""
    alone = (0.2, 0.3, 0.16, 0.4)

    def damage(_model: object, _modules: object, places: Sequence[int], _windows: object) -> torch.Tensor:
        together = sum(alone[place] for place in places) + (1.0 if {1, 2} <= set(places) else 0.0)
        return torch.tensor([together, together])

    monkeypatch.setattr(ranking, "static_damage", damage)
    policy = tiny_policy(checkpoint, "linear", units=parse_units("1,2-3,4,5"))
    calls: list[tuple[int, int]] = []
    order = greedy_order(model, SkipModules(policy), [], lambda _, done, total: calls.append((done, total)))
    assert order == (1, 0, 2, 3)
    assert calls == [(number, ranking_work(4)) for number in range(1, ranking_work(4) + 1)]
