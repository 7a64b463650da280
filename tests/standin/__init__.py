"""A card that is not there: CUDA's runtime and driver, TensorRT and ONNX Runtime, as far as the product calls them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.standin.cuda import Card


@contextmanager
def installed(card: Card) -> Iterator[None]:
    """Whoever asks for a driver, CUDA, TensorRT or ONNX Runtime on CUDA gets the card's."""
    from dash_export.backends.cuda import cuda_devices, kernels, onnxruntime_cuda
    from dash_export.backends.tensorrt import trt_api
    from dash_export.bundle import recipe, records
    from tests.standin.modules import Runtime, driver, libcuda
    from tests.standin.ort_cuda import onnxruntime
    from tests.standin.trt import toolkit

    def faults(recipe: Any, sound: Any = recipe.recipe_faults) -> list[str]:
        return [fault for fault in sound(recipe) if "no fp32 attention" not in fault]  # ONNX Runtime has one

    def forget() -> None:
        for known in (kernels.load_kernels, trt_api.load_toolkit):
            known.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        modules: dict[str, Any] = {"cuda.bindings.runtime": Runtime(card), "cuda.bindings.driver": driver(card)}
        for name, module in (modules | {name: toolkit(card, name) for name in ("tensorrt", "tensorrt_rtx")}).items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(onnxruntime_cuda, "ort", onnxruntime(card))
        patch.setattr(cuda_devices, "_driver", lambda: libcuda(card))
        patch.setattr(trt_api, "_logger", cache(trt_api._logger.__wrapped__))  # else it would keep the card for good
        patch.setattr(trt_api.atexit, "register", lambda *call: card.at_exit.append(call))
        patch.setattr(trt_api, "Thread", card.thread)
        for module in (records, recipe):
            patch.setattr(module, "recipe_faults", faults)
        forget()
        yield
        forget()
