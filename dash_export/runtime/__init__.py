"""Engines -> tokens. Imports numpy, tokenizers, jinja2 and one backend; never torch, transformers or onnx."""

from __future__ import annotations

from dash_export.runtime.runtime import DashRuntime
from dash_export.runtime.sampling import Sampling
from dash_export.runtime.session import Generation, Response, Score, Session, Statistics

__all__ = ["DashRuntime", "Generation", "Response", "Sampling", "Score", "Session", "Statistics"]
