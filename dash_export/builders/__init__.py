"""Portable graphs + recipe -> engines."""

from __future__ import annotations

from dash_export.builders.build import build

__all__ = ["build"]
