"""Makers for devices with streams: their common part, and graphs for ONNX Runtime on CUDA, which any machine lowers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from dash_export import __version__
from dash_export.backends.cuda.cuda import require_bindings
from dash_export.backends.cuda.cuda_devices import cuda_devices
from dash_export.backends.maker import Backend
from dash_export.bundle.layout import LOWERED
from dash_export.bundle.recipe import QUANTISED, EngineRecipe, Recipe
from dash_export.errors import BackendError

if TYPE_CHECKING:
    import onnx_ir as ir

    from dash_export.bundle.bundle import Bundle
    from dash_export.graphs.lower.rounded import Roundings


class GpuBackend(Backend):
    """Base of all GPU backends: needs a device of the recipe's compute capabilities to run."""

    revision = 10

    @property
    def engine(self) -> EngineRecipe:
        """The recipe's [engine] table."""
        assert self.recipe.engine is not None
        return self.recipe.engine

    def faults(self) -> Iterator[str]:
        recipe, weights, engine, precisions = (
            self.recipe,
            self.recipe.weights,
            self.recipe.engine,
            self.recipe.precisions,
        )
        if engine is None:
            yield f"backend {recipe.backend!r} needs an [engine] table with at least `capabilities`."
            return
        if recipe.dialect == "ort":
            yield f"dialect 'ort' is for the CPU; {recipe.backend} takes 'portable' or 'trt10'."
        capabilities = engine.capabilities
        if not capabilities or not all(re.fullmatch(r"[1-9]\d?\.\d", item) for item in capabilities):
            yield f'capabilities = {list(capabilities)} must be compute capabilities like "8.7".'
            return
        young = [value for value in ("bf16", "int4") if value in (*precisions.values(), engine.activations)]
        if young and "7.5" in capabilities:
            yield f"{young[0]!r} needs compute capability 8.0 or newer: take 7.5 out of `capabilities`."
        if weights.rounding == "as-is":
            yield "rounding = 'as-is' is for CPUs: GPU engines take 'nearest' or 'gptq'."
        if not weights.symmetric:
            yield "symmetric must be true in [weights]: GPU engines take no zero points."
        for part, value in precisions.items():
            allowed = (engine.activations, *(() if part == "embedding" else QUANTISED))
            if value not in allowed:
                listed = ", ".join(map(repr, allowed))
                yield f"{part} = {value!r} is not one of {listed} (activations are fixed in [engine])."
        if recipe.runtime.prefill_chunk > engine.kv_capacity:
            yield f"prefill_chunk = {recipe.runtime.prefill_chunk} is more than kv_capacity = {engine.kv_capacity}."

    def require_runtime(self) -> None:
        if (reason := self.device_obstacle()) is not None:
            raise BackendError(reason)
        super().require_runtime()
        require_bindings()

    def device_obstacle(self) -> str | None:
        """Return why this machine's first CUDA device does not fit the recipe; None where it does."""
        wanted = ", ".join(self.engine.capabilities)
        try:
            device = cuda_devices()[0]
        except BackendError as error:
            return f"it needs a device of compute capability {wanted}. {error}"
        if device.capability not in self.engine.capabilities:
            return f"it needs compute capability {wanted}, and {device.name} has {device.capability}."
        return None

    def key(self) -> Any:
        return self.recipe.dialect, asdict(self.engine)

    def lower(
        self, bundle: Bundle, _name: str, _parts: Sequence[str], composed: Callable[[], ir.Model], roundings: Roundings
    ) -> ir.Model:
        from dash_export.graphs.lower.trt import lower

        return lower(composed(), bundle.manifest, self.recipe, roundings)


class LoweringBackend(GpuBackend):
    """Lowered graphs for another machine, which compiles them. They are a build of their own, named after it."""

    encodes = always_verifies = True

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(replace(recipe, name=f"{recipe.name}{LOWERED}"))

    def version(self) -> str:
        return "not compiled"

    def device(self) -> str:
        return f"a device of compute capability {', '.join(self.engine.capabilities)}, which compiles them"

    def details(self) -> dict[str, Any]:
        return {"lowering": self.revision}


class CudaBackend(GpuBackend):
    """Lowered graphs that ONNX Runtime takes as they are: they do not depend on the ONNX Runtime that will run them."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.recipe.engine is not None and "fp8" in self.recipe.precisions.values():
            yield f"'fp8' is for TensorRT; {self.recipe.backend} takes {self.engine.activations!r}, 'int8' or 'int4'."

    def require_runtime(self) -> None:
        super().require_runtime()
        try:
            from dash_export.backends.cuda.onnxruntime_cuda import require_cuda
        except Exception as error:  # a broken install can raise anything
            raise BackendError(f"The package onnxruntime cannot be imported ({error}).") from error
        require_cuda()

    def version(self) -> str:
        return f"dash-export {__version__}"

    def device(self) -> str:
        return "any CUDA device"
