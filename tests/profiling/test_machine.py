"""Statistics by hand; what the machine tells."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np

from dash_export.profiling.bandwidth import measure_bandwidth
from dash_export.profiling.machine import this_machine
from dash_export.profiling.statistics import middle, spread


def test_spread() -> None:
    found = spread(np.arange(101) * 1000, 1e-3)
    assert found is not None
    assert (found.mean, found.p50, found.p90, found.p99, found.count) == (50, 50, 90, 99, 101)
    assert spread([]) is None


def test_middle_covers_the_median() -> None:
    """95 % intervals of the median of an exponential, which is ln 2, cover it about as often."""
    rng = np.random.default_rng(0)
    found = [middle(rng.exponential(size=60)) for _ in range(400)]
    covered = [one is not None and one.low <= np.log(2) <= one.high for one in found]
    assert 0.92 < np.mean(covered) < 0.99
    assert middle([]) is None
    assert middle([3.0]) == middle([3.0, 3.0])


def test_bandwidth() -> None:
    found = measure_bandwidth(8 << 20)
    assert 0 < found.read_median <= found.read
    assert 0 < found.copy_median <= found.copy
    assert found.stream == max(found.read, found.copy)
    assert 0 < found.bytes <= 8 << 20


def test_machine() -> None:
    found = this_machine()
    assert found.cores >= 1
    assert json.loads(json.dumps(asdict(found)))["cpu"] == found.cpu
    assert replace(found, load=2.0, cores=2).busy
    assert not replace(found, load=0.2, cores=2).busy
    assert not replace(found, load=None).busy
