"""What TensorRT compiles: the portable graphs with fixed caches, 16-bit activations and block-quantised weights."""

from __future__ import annotations

from dash_export.graphs.trt.lower import lower

__all__ = ["lower"]
