"""A tiny model's GPU graphs at float32, where rounding hides nothing, on a simulated device."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.building import build
from dash_export.bundle import Bundle
from dash_export.decision import DecisionRule, decision_rule
from tests.runtime.device.simulated import SimulatedDevice
from tests.tiny import TINY_UNITS

RECIPE = """
backend = "onnxruntime_cuda"
dialect = "{dialect}"
[engine]
capabilities = ["9.0"]
activations = "fp32"
kv_capacity = 96
[weights]
layers = "fp32"
qkv = "fp32"
ungated = "fp32"
head = "fp32"
embedding = "fp32"
bypass = "fp32"
symmetric = true
[runtime]
dispatch = "overlapped"
prefill_chunk = 16
"""
DIALECTS = ("trt10", "portable")
DISPATCH = ("sync", "overlapped", "device")
ORDERS = ("main", "beside", 0, 1)
TOLERANCE = 1e-4
IDS = np.random.default_rng(5).integers(0, 300, 60).astype(np.int64)


@pytest.fixture(scope="session")
def device_bundle(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Built for `cpu-fp32` and, in both GPU dialects, for a device."""
    folder = tmp_path_factory.mktemp("device")
    root = Path(shutil.copytree(tiny_root, folder / "tiny.dash"))
    for dialect in DIALECTS:
        (folder / f"{dialect}.toml").write_text(RECIPE.format(dialect=dialect))
        build(root, str(folder / f"{dialect}.toml"))
    return Bundle.open(root)


@dataclass(frozen=True)
class Simulated:
    """A runtime and the device it runs on."""

    runtime: DashRuntime
    device: SimulatedDevice


MakeSimulated = Callable[..., Simulated]


@pytest.fixture
def simulated(device_bundle: Bundle) -> MakeSimulated:
    """`simulated(dialect="trt10", dispatch="overlapped", first="main", obstacle=None)`."""

    @cache
    def make(
        dialect: str = "trt10", dispatch: str = "overlapped", first: str | int = "main", obstacle: str | None = None
    ) -> Simulated:
        device = SimulatedDevice(first, obstacle)
        return Simulated(DashRuntime(device_bundle, device_bundle.load_build(dialect), device, dispatch), device)

    return make


def decoded(runtime: DashRuntime, rule: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits and actions of 25 tokens decoded one by one after a prompt of 20."""
    session = runtime.session_under(rule)
    session.prefill(IDS[:20])
    steps = [session.decode_one(int(token)) for token in IDS[20:45]]
    return np.array([logits for logits, _ in steps]), np.array([actions for _, actions in steps])


@dataclass(frozen=True)
class Host:
    """The same model on the CPU, which other tests compare with the oracle, and what it gives under `rule`."""

    runtime: DashRuntime

    @cached_property
    def ratio(self) -> float:
        """Skips about half of what may be skipped."""
        return float(np.median(self.runtime.session().score(IDS).damage[2:] / (0.2, 0.1)))

    def limited(self, max_layers: int | None = None) -> DecisionRule:
        return decision_rule(TINY_UNITS, (0.2, 0.1), self.ratio, max_layers, 6)

    @cached_property
    def rule(self) -> DecisionRule:
        return self.limited()

    @cached_property
    def decoded(self) -> tuple[np.ndarray, np.ndarray]:
        return decoded(self.runtime, self.rule)

    def differs(self, made: Simulated) -> bool:
        """Whether decode on a device gives other logits or actions."""
        (found, taken), (expected, actions) = decoded(made.runtime, self.rule), self.decoded
        return bool((taken != actions).any() or not np.abs(found - expected).max() < TOLERANCE)


@pytest.fixture(scope="session")
def host(device_bundle: Bundle) -> Host:
    return Host(DashRuntime.load(device_bundle.root, "cpu-fp32"))
