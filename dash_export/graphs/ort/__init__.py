"""The `ort` dialect: portable graphs rewritten into what ONNX Runtime runs best on a CPU."""

from __future__ import annotations

from dash_export.graphs.ort.lower import lower
from dash_export.graphs.ort.quantize import CONTRIB

__all__ = ["CONTRIB", "lower"]
