"""Ministral: Mistral whose layers take turns with and without a window, as its config says."""

from dash_export.models.families.mistral import decoder

__all__ = ["decoder"]
