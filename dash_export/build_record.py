"""Names of `dash_export.manifest` that were here."""

from __future__ import annotations

from dash_export.manifest import MIXED, POLICY, QUIET, Build, CostTable, EngineRecord, Segment, check_build

__all__ = ["MIXED", "POLICY", "QUIET", "Build", "CostTable", "EngineRecord", "Segment", "check_build"]
