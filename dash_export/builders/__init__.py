"""Portable graphs + recipe -> engines."""

from __future__ import annotations

from dash_export.builders.building import build

__all__ = ["build"]
