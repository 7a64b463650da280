"""TensorRT-RTX: the same runtime under another name."""

from __future__ import annotations

from dash_export.runtime.device.tensorrt import TensorRT


def create(_threads: int) -> TensorRT:
    return TensorRT("tensorrt_rtx")
