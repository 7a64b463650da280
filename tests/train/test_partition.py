"""Which units a made-up table asks for."""

from __future__ import annotations

import numpy as np
import pytest

from dash_export.decision import Unit
from dash_export.models import Checkpoint
from dash_export.models.bypasses import full_bypass
from dash_export.train.cost import saved
from dash_export.train.partition import LAUNCH, Candidate, best_partition, candidate_units, judged_candidate
from tests.tiny import tiny_policy


def table(**gains: float) -> list[Candidate]:
    """By "first_last"."""
    spans = [(Unit(*map(int, name.strip("u").split("_"))), gain) for name, gain in gains.items()]
    return [Candidate(unit, 0.1, 0.1, gain) for unit, gain in spans]


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ({"u2_3": 0.05, "u3_4": 0.08, "u4_5": 0.05}, "2-3 4-5"),
        ({"u2_3": 0.05, "u3_4": 0.12, "u4_5": 0.05}, "3-4"),
        ({"u2_2": 0.03, "u3_3": 0.03, "u2_3": 0.06 - LAUNCH / 2}, "2-3"),
        ({"u2_2": 0.03, "u3_3": 0.03, "u2_3": 0.06 - 2 * LAUNCH}, "2 3"),
        ({"u2_3": 0.05, "u5_5": LAUNCH / 2}, "2-3"),
        ({"u2_3": 0.05, "u5_5": LAUNCH * 2}, "2-3 5"),
        ({"u2_5": 0.0}, ""),
    ],
)
def test_best_partition(gains: dict[str, float], expected: str) -> None:
    assert " ".join(str(found.unit) for found in best_partition(table(**gains), 6)) == expected


def test_best_partition_is_that_of_all() -> None:
    rng = np.random.default_rng(0)
    made = [Candidate(unit, 0.1, 0.1, float(rng.random() * len(unit.layers))) for unit in candidate_units(8)]

    def most(layer: int) -> float:
        if layer == 8:
            return 0.0
        own = [own.gain - LAUNCH + most(own.unit.last + 1) for own in made if own.unit.first == layer]
        return max([most(layer + 1), *own])

    assert sum(found.gain - LAUNCH for found in best_partition(made, 8)) == pytest.approx(most(0))


def test_a_gain_is_what_tokens_save_that_can_skip() -> None:
    """At trade-offs of 1 only: of two tokens one skips, and saves 0.1 for a damage of 0.02."""
    found = judged_candidate(Unit(2, 3), np.array([0.02, 0.5]), 0.1, (1.0, 1.0))
    assert found.gain == pytest.approx((0.1 - 0.02) / 2)
    assert found.damage == pytest.approx(0.26)
    assert judged_candidate(Unit(2, 3), np.zeros(4), 0.1, (0.25, 1.5)).gain == pytest.approx(0.1)
    assert judged_candidate(Unit(2, 3), np.zeros(4), -0.1, (0.25, 1.5)).gain == 0


def test_candidates() -> None:
    units = candidate_units(30)
    assert {unit.first for unit in units} == set(range(5, 30))
    assert max(unit.last for unit in units) == 29
    assert candidate_units(3) == (Unit(2, 2),)
    assert candidate_units(2) == ()


def test_saved_is_bytes(checkpoint: Checkpoint) -> None:
    spec, policy = checkpoint.spec, tiny_policy(checkpoint, "linear")
    sizes = {name: np.prod(shape) for name, shape in spec.weight_shapes().items() if len(shape) == 2}
    token = sum(size for name, size in sizes.items() if "embed_tokens" not in name) / 2
    for unit, bypass in zip(policy.units, policy.bypasses, strict=True):
        full = full_bypass(bypass, unit, checkpoint)
        owed = sum(array.size for array in full.values() if array.ndim == 2)
        layers = sum(size for name, size in sizes.items() for layer in unit.layers if f"layers.{layer}." in name) / 2
        assert saved(spec, len(unit.layers)) == pytest.approx((layers - owed) / token, rel=0.02)
