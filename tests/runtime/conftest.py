"""What the tests of the runtime share."""

from collections.abc import Callable
from typing import Any

import pytest

from dash_export import DashRuntime


@pytest.fixture
def setting_of(runtime: DashRuntime) -> Callable[[str], dict[str, Any]]:
    """`setting_of(kind)`: arguments at which that kind skips some units and runs others."""
    trade_off = next(point.trade_off for point in runtime.build.dial if 3.2 < point.layers < 4.6)
    budget = runtime.build.dial[len(runtime.build.dial) // 2].time
    return {
        "dense": {},
        "static": {"policy": "static", "skip": (2, 3)},
        "token": {"policy": "token", "trade_off": trade_off},
        "bounded": {"budget": budget, "max_layers": 5},
        "held": {"budget": budget, "hold": True},
    }.__getitem__
