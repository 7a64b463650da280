"""Bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest

from dash_export.evaluation.bootstrap import interval


def test_ratio_of_sums_not_mean_of_ratios() -> None:
    found = interval([1.0, 9.0], [1.0, 3.0])
    assert found.value == pytest.approx(10 / 4)
    assert (found.low, found.high) == pytest.approx((1.0, 3.0))


def test_width_is_that_of_the_mean() -> None:
    sample = np.random.default_rng(0).normal(5.0, 2.0, 400)
    found = interval(sample)
    assert found.value == pytest.approx(sample.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * sample.std() / 20, rel=0.1)


def test_transform_and_seed() -> None:
    logs = [0.1, 0.5, 0.9]
    plain, raised = interval(logs), interval(logs, transform=np.exp)
    assert (raised.value, raised.low, raised.high) == pytest.approx(np.exp([plain.value, plain.low, plain.high]))
    assert interval(logs, seed=1) == interval(logs, seed=1)


def test_many_units_are_drawn_in_blocks() -> None:
    found = interval(np.arange(5000) % 2)
    assert found.value == 0.5
    assert 0.48 < found.low < 0.49 < 0.51 < found.high < 0.52


def test_one_unit_has_no_width() -> None:
    found = interval([0.25])
    assert found.low == found.value == found.high == 0.25


def test_nothing_to_average() -> None:
    with pytest.raises(ValueError, match="nothing"):
        interval([])
