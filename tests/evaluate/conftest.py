"""The tiny runtime that every measure is tried on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dash_export import DashRuntime


@pytest.fixture
def runtime(tiny_runtime: Callable[..., DashRuntime]) -> DashRuntime:
    return tiny_runtime()
