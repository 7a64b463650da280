"""Bootstrap intervals."""

import numpy as np
import pytest

from dash_export.measure.intervals import FEWEST, interval, median_ratios


def test_ratio_of_sums_not_mean_of_ratios() -> None:
    found = interval([1.0, 9.0], [1.0, 3.0])
    assert (found.value, found.low, found.high) == pytest.approx((10 / 4, 1.0, 3.0))
    raised = interval([1.0, 9.0], [1.0, 3.0], transform=np.exp)
    assert (raised.value, raised.low, raised.high) == pytest.approx(np.exp([found.value, found.low, found.high]))
    assert found == interval([1.0, 9.0], [1.0, 3.0]), "the same resamples every time"
    one = interval([0.25])
    assert one.low == one.value == one.high == 0.25


def test_what_a_round_has_in_common_is_no_ratio() -> None:
    """A machine that is up to three times slower in whole rounds, and 5 % of noise in every block."""
    rng = np.random.default_rng(0)
    true = np.linspace(1.0, 0.6, 8)
    seconds = true[:, None] * rng.uniform(1, 3, 200) * np.exp(0.05 * rng.standard_normal((8, 200)))
    found = median_ratios(seconds)
    np.testing.assert_allclose([one.value for one in found], true, rtol=0.015)
    assert all(one.low <= one.value <= one.high for one in found)
    assert 0.005 < np.mean([one.high - one.low for one in found[1:]]) < 0.03
    assert all(one.low == one.value == one.high for one in median_ratios(seconds[:, : FEWEST - 1]))
