"""Engines of a build on the host, by what its decisions are about."""

from __future__ import annotations

from dash_export.backends.host.decode import EngineSet
from dash_export.backends.host.encoder_pass import EncoderEngines
from dash_export.backends.host.segments import HostBackend
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.records import Build

_KINDS: dict[str, type[EngineSet] | type[EncoderEngines]] = {"token": EngineSet, "input": EncoderEngines}


def load_on_host(bundle: Bundle, build: Build, backend: HostBackend) -> EngineSet | EncoderEngines:
    """Load all engines of a build."""
    return _KINDS[bundle.manifest.model.decides](bundle, build, backend)
