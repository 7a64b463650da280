"""Statistics by hand; what the machine tells."""

from __future__ import annotations

import json
import signal
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from dash_export.decision import Setting
from dash_export.errors import BackendError
from dash_export.profiling.bandwidth import measure_bandwidth
from dash_export.profiling.machine import peak_memory, this_machine
from dash_export.profiling.memory import setting_memory
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
    assert peak_memory() > 1 << 20


def test_memory_of_a_setting(tiny_root: Path) -> None:
    peak = setting_memory(tiny_root, "cpu-fp32", "fused", Setting("token", skipped=1.0), 8, 2)
    assert 1 << 24 < peak < 1 << 30
    with pytest.raises(BackendError, match="There is no bundle"):
        setting_memory(tiny_root / "none", "cpu-fp32", "plain", Setting("dense"), 8, 2)


def test_a_killed_child_costs_its_figure_only(tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.CompletedProcess([], -signal.SIGKILL, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    assert setting_memory(tiny_root, "cpu-fp32", "plain", Setting("dense"), 8, 2) is None
    killed.returncode = -signal.SIGSEGV  # that is a bug, and told
    with pytest.raises(BackendError, match="-11"):
        setting_memory(tiny_root, "cpu-fp32", "plain", Setting("dense"), 8, 2)
