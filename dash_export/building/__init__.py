"""Portable graphs + recipe -> engines."""

from dash_export.building.pipeline import build

__all__ = ["build"]
