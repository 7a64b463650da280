"""Engines of another version or another card are refused before TensorRT sees them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from dash_export.bundle import Bundle
from dash_export.errors import BackendError
from dash_export.manifest import Build
from dash_export.runtime.device.tensorrt import TensorRT


@pytest.fixture
def build(device_bundle: Bundle) -> Build:
    return replace(device_bundle.load_build("trt10"), backend="tensorrt", backend_version="10.3.0")


def device(version: str, capability: str) -> Any:
    """A TensorRT device with nothing but what `accept` asks."""
    made: Any = object.__new__(TensorRT)
    made.backend = "tensorrt"
    made.toolkit = SimpleNamespace(version=version)
    made.cuda = SimpleNamespace(device=SimpleNamespace(name="a card", capability=capability))
    return made


def test_its_own_build(build: Build) -> None:
    device("10.3.0", "9.0").accept(build, "rebuild")


def test_another_version(build: Build) -> None:
    with pytest.raises(BackendError, match=r"by tensorrt 10\.3\.0 and this machine has 11\.4\.1.*rebuild me"):
        device("11.4.1", "9.0").accept(build, "rebuild me")


def test_another_card(build: Build) -> None:
    with pytest.raises(BackendError, match=r"for compute capability 9\.0, and a card has 8\.7"):
        device("10.3.0", "8.7").accept(build, "rebuild")
