"""Portable graphs + recipe -> engines."""

from __future__ import annotations

from dash_export.building.pipeline import build

__all__ = ["build"]
