"""Which units and which order made-up damages ask for."""

from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
import pytest

from dash_export.core.units import Unit, check_units, parse_units, units_text
from dash_export.train.partition import (
    LAUNCH,
    Candidate,
    best_partition,
    candidate_groups,
    greedy_order,
    mean_gain,
    ruled_units,
    units_that_pay,
)


def test_best_partition_is_that_of_all() -> None:
    rng = np.random.default_rng(0)
    made = [
        Candidate(unit, 0.1, 0.1, float(rng.random() * len(unit.layers)))
        for group in candidate_groups(8)
        for unit in group
    ]

    def most(layer: int) -> float:
        if layer == 8:
            return 0.0
        own = [own.gain - LAUNCH / 2 + most(own.unit.last + 1) for own in made if own.unit.first == layer]
        return max([most(layer + 1), *own])

    assert sum(found.gain - LAUNCH / 2 for found in best_partition(made, 8)) == pytest.approx(most(0))
    assert best_partition([Candidate(Unit(2, 3), 0.1, 0.1, LAUNCH / 4)], 8) == (), "a launch costs more"


def test_units_that_pay_are_those_of_all_sets() -> None:
    """An engine more for each unit, and for the layers between two that are not neighbours."""
    units = parse_units("2,3,4-5,7,8-9,12,13")

    def worth(kept: tuple[int, ...], gains: Sequence[float]) -> float:
        gaps = sum(units[after].first > units[before].last + 1 for before, after in pairwise(kept))
        return sum(gains[place] for place in kept) - LAUNCH * (len(kept) + gaps)

    rng = np.random.default_rng(0)
    for _ in range(20):
        gains = (rng.random(len(units)) ** 2 * 3 * LAUNCH).tolist()
        sets = (kept for size in range(1, 8) for kept in combinations(range(len(units)), size))
        assert units_that_pay(units, gains) == max(sets, key=lambda kept: worth(kept, gains))
    assert units_that_pay(units[:2], (0.0, 0.0)) in ((0,), (1,)), "one is left"


def test_a_gain_is_what_tokens_save_that_can_skip() -> None:
    """At trade-offs of 1 only: of two tokens one skips, and saves 0.1 for a damage of 0.02."""
    assert mean_gain(np.array([0.02, 0.5]), 0.1, (1.0, 1.0)) == pytest.approx((0.1 - 0.02) / 2)
    assert mean_gain(np.zeros(4), 0.1, (0.25, 1.5)) == pytest.approx(0.1)
    assert mean_gain(np.zeros(4), -0.1, (0.25, 1.5)) == 0


def test_candidates() -> None:
    """In groups of four layers at which they begin: their sums are in memory at once."""
    groups = candidate_groups(30)
    assert [sorted({unit.first for unit in group}) for group in groups[:2]] == [[5, 6, 7, 8], [9, 10, 11, 12]]
    assert max(unit.last for group in groups for unit in group) == 29
    assert candidate_groups(3) == [[Unit(2, 2)]]
    assert candidate_groups(2) == []


def test_units_by_a_rule() -> None:
    for layers, text in ((30, "6-10,11-15,16-20,21-25,26-28"), (24, "5-8,9-12,13-16,17-20,21-22"), (6, "2,3,4")):
        assert units_text(ruled_units(layers)) == text
    for layers in range(4, 100):
        check_units(units := ruled_units(layers), units[0].first - 1, layers)


def test_each_adds_least_for_its_size() -> None:
    """The second costs more than the first alone but less a layer; after it the third is dearer than alone."""
    alone = (0.2, 0.3, 0.16, 0.4)

    def damage(places: tuple[int, ...]) -> float:
        return sum(alone[place] for place in places) + (1.0 if {1, 2} <= set(places) else 0.0)

    calls: list[tuple[int, int]] = []
    order = greedy_order([1, 2, 1, 1], damage, lambda _, done, total: calls.append((done, total)))
    assert order == (1, 0, 3, 2)
    assert calls == [(number, 7) for number in range(1, 8)], "four alone, three beside the first"
