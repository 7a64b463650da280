"""What a cost table says of a token or of a picture."""

from dataclasses import replace

import numpy as np
import pytest

from dash_export.core.dial import CostTable

TABLE = CostTable(0, 0.0, {}, {}, (0.2, 0.2, 0.4), "", exits=(0.01, 0.02, 0.04))
LEAVES = np.tri(4, 3, k=-1, dtype=np.bool_).T[::-1]
"""Skips [units, pictures]: the first picture runs all, each next one leaves a unit earlier."""


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (False, (1.0, 1 - 0.4 + 0.04, 1 - 0.6 + 0.02, 1 - 0.8 + 0.01)),  # a fixed place: no other exit is asked
        (True, (1.07, 1 - 0.4 + 0.07, 1 - 0.6 + 0.03, 1 - 0.8 + 0.01)),
    ],
)
def test_a_picture_pays_for_the_exits_that_it_reaches(asked: bool, expected: tuple[float, ...]) -> None:
    assert TABLE.token_time(LEAVES, asked) == pytest.approx(expected)


def test_what_is_asked_and_skips_nothing() -> None:
    nothing = np.zeros((3, 1), np.bool_)
    for table in (TABLE, replace(TABLE, exits=(), asks=0.05)):
        assert table.dense_asked == pytest.approx(table.token_time(nothing, asked=True)[0])
