"""Engines -> tokens. Imports numpy, tokenizers and one backend; never torch, transformers or onnx."""

from dash_export.core.own_policy import Policy
from dash_export.core.rule import State
from dash_export.core.sampling import Sampling
from dash_export.runtime.batch import Batch
from dash_export.runtime.results import Generation, Response, Score, Statistics
from dash_export.runtime.runtime import DashRuntime
from dash_export.runtime.session import Session

__all__ = [
    "Batch",
    "DashRuntime",
    "Generation",
    "Policy",
    "Response",
    "Sampling",
    "Score",
    "Session",
    "State",
    "Statistics",
]
