"""The PyTorch oracle that everything else is compared with."""

from dash_export.reference.oracle import Oracle

__all__ = ["Oracle"]
