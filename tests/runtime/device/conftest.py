"""A tiny model's GPU graphs at float32, where rounding hides nothing, on a simulated device."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.building import build
from dash_export.bundle import Bundle
from tests.runtime.device.simulated import SimulatedDevice

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
        dialect: str = "trt10",
        dispatch: str = "overlapped",
        first: str | int = "main",
        obstacle: str | None = None,
    ) -> Simulated:
        device = SimulatedDevice(first, obstacle=obstacle)
        return Simulated(DashRuntime(device_bundle, device_bundle.load_build(dialect), device, dispatch), device)

    return make


@pytest.fixture(scope="session")
def host(device_bundle: Bundle) -> DashRuntime:
    """The same model on the CPU."""
    return DashRuntime.load(device_bundle.root, "cpu-fp32")


IDS = np.random.default_rng(5).integers(0, 300, 60).astype(np.int64)
