"""Checks of a recipe for a device with streams."""

import re
from collections.abc import Iterator

from dash_export.bundle.recipe import QUANTISED, Recipe


def faults(recipe: Recipe) -> Iterator[str]:
    """Yield what does not go together, for ONNX Runtime on CUDA."""
    yield from device_faults(recipe)
    if recipe.engine is not None and "fp8" in recipe.precisions.values():
        yield f"'fp8' is for TensorRT; {recipe.backend} takes {recipe.engine.activations!r}, 'int8' or 'int4'."


def device_faults(recipe: Recipe) -> Iterator[str]:
    """Yield what does not go together on any device."""
    weights, engine, precisions = recipe.weights, recipe.engine, recipe.precisions
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
